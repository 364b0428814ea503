"""World models of images that carry spurious correlations: what does the latent know?"""

__version__ = "0.1.0"

# Where the public names live. Nothing is imported before a name is asked for, so that `import dreamer_wb` costs nothing.
_homes = {name: module for module, names in {
    'core.config': 'TrainConfig WorldModelConfig compose',
    'core.runs': 'Run UserError',
    'core.learner': 'fit',
    'data.waterbirds': 'read_table',
    'data.synthetic': 'make_waterbirds',
    'data.episodes': 'Batches EpisodeStore read_episode write_episode',
    'data.prepare': 'PrepareConfig prepare',
    'dreamer.rssm': 'RSSM',
    'dreamer.world_model': 'DreamerWorldModel train_world_model',
    'classifier.metrics': 'group_metrics',
    'classifier.latents': 'extract_latents',
    'classifier.compare': 'ClassifyConfig classify',
}.items() for name in names.split()}

__all__ = sorted(_homes)


def __getattr__(name):
    "Import the module of a public name when the name is first used (PEP 562)."
    if name not in _homes: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f'.{_homes[name]}', __name__), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})
