"Concept editing from the outside: the commands, the environment by its name, an interrupted training, and what real data lack."
import numpy as np
import pytest
import torch

from dreamer_wb.cli import COMMANDS, kind_of, main
from dreamer_wb.concepts.env import Scenes, WaterbirdsConceptEnv, concept_episodes, draw_scenes, read_scenes, register_concepts
from dreamer_wb.concepts.shifter import BackgroundEdit, ConceptShifter, WorldEdit, bird_boxes, clear_bird, lay_birds, move_background
from dreamer_wb.core.runs import UserError, read_json, write_json
from dreamer_wb.data.episodes import EpisodeStore, write_episode
from dreamer_wb.data.synthetic import sample_specs
from dreamer_wb.dreamer.world_model import DreamerWorldModel

SMALL = ['size=32', 'encoder={depth: 8, mults: [1, 2, 4]}', 'decoder={depth: 8, mults: [1, 2, 4]}', 'dynamics={stoch: 16, deter: 64, hidden: 64}', 'loop.progress=false', 'loop.tensorboard=false']


@pytest.fixture(scope='module')
def scenes(): return draw_scenes(sample_specs((40, 16, 16), seed=2)['train'], 32)


def test_the_commands_of_stage_c(tmp_path, monkeypatch, capsys):
    "Stills, stage A, edits: each of the three commands as it is typed."
    monkeypatch.chdir(tmp_path)
    assert kind_of(COMMANDS['prepare'], ['stills=a', 'out_dir=b']).schema.endswith('ConceptEpisodesConfig')
    assert kind_of(COMMANDS['train'], ['experiment=waterbirds_concept', 'start=a']).schema.endswith('ConceptTrainConfig')
    def run(*args): assert not main(list(args)), args
    run('prepare', 'source=synthetic', 'n=100', 'size=32', 'out_dir=stills', 'workers=1')
    run('train', 'experiment=demo', 'data_dir=stills', 'name=a', 'loop.steps=2', 'doctor=false', *SMALL)
    run('prepare', 'stills=stills', 'out_dir=concepts', 'steps=4')
    run('prepare', 'stills=stills', 'out_dir=pairs', 'steps=4', 'concepts=[background,bird]')
    more = ['experiment=waterbirds_concept_cpu', 'start=runs/demo/a', 'batch_size=4', 'loop.steps=2', 'loop.eval_every=2', 'latent_steps=5', *SMALL[4:]]
    run('train', 'data_dir=stills', 'name=spot', *more)
    run('train', 'data_dir=concepts', 'name=disk', *more, 'latent_steps=0')
    run('train', 'data_dir=pairs', 'name=pairs', *more, 'latent_steps=0', 'concepts=[background,bird]')
    run('train', 'data_dir=stills', 'name=both', *more, 'concepts=[background,bird]', 'starts=.5', 'leak=.1')
    world = DreamerWorldModel.load_from_checkpoint('runs/waterbirds_concept_cpu/spot/checkpoints/world_model.ckpt').eval()
    z0 = world.encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))[0]                # the users' three lines
    a_seq = torch.linspace(0, 1, 5)[:, None]
    zs = world.rollout(z0, actions=a_seq)
    assert world.decoder(zs).shape == (2, 5, 3, 32, 32)
    assert EpisodeStore('concepts/train').lengths.max() == 4
    for name in ('pairs', 'both'): assert DreamerWorldModel.load_from_checkpoint(f'runs/waterbirds_concept_cpu/{name}/checkpoints/world_model.ckpt').cfg.action_dim == 2


def test_the_environment_is_what_the_world_model_learns_from(scenes):
    "Steps of the environment and rows of a batch are the same edits."
    d = BackgroundEdit(scenes.donors())
    env = WaterbirdsConceptEnv(scenes, d, time_limit=5)
    first, info = env.reset(seed=3)
    env.draw, alphas = 11, torch.tensor([[0., 1., .25, .5]])
    steps = np.stack([first] + [env.step([a])[0] for a in alphas[0].tolist()])
    want = concept_episodes(scenes[[info['index']]], d, alphas, seed=11)['obs'][0].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(steps, want)


def test_the_environment_by_its_name():
    import gymnasium
    register_concepts()
    register_concepts()                                                                # twice does no harm
    env = gymnasium.make('dreamer_wb/WaterbirdsConcept-v0', meaning='shift', time_limit=3)
    factual, _ = env.reset(seed=0)
    assert np.array_equal(env.step(np.zeros(1, np.float32))[0], factual)               # shift 0: nothing happens
    assert env.step(np.ones(1, np.float32))[3]


def test_images_without_masks(scenes):
    "Real photographs may have no masks: what then works, and what is said."
    bare = Scenes(scenes.obs, torch.zeros_like(scenes.mask), scenes.label, scenes.place)
    with pytest.raises(UserError, match='no image has a mask'): bare.donors()
    with pytest.raises(UserError, match='needs the mask'): ConceptShifter(1. * BackgroundEdit(scenes.donors()))(bare.obs)
    assert not len(bare.masked())


@pytest.mark.parametrize('side', ['all', 'rows', 'corner', 'none'])
def test_holes_of_any_shape(side):
    "A hole is filled from what is left; what is not hole stays."
    obs = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    mask = torch.zeros(2, 24, 24, dtype=torch.bool)
    if side == 'all': mask[:] = True
    if side == 'rows': mask[:, 5:12] = True
    if side == 'corner': mask[:, :9, :9] = True
    out = clear_bird(obs, mask, grow=0)
    assert out.shape == obs.shape and out.dtype == torch.uint8
    assert torch.equal(out.permute(0, 2, 3, 1)[~mask], obs.permute(0, 2, 3, 1)[~mask])
    if side == 'rows': assert torch.equal(out[:, :, 7], obs[:, :, 4])


def test_a_blend_is_between_its_ends(scenes):
    from hypothesis import given, settings, strategies as st
    a, b = scenes.obs[:3], scenes.obs[3:6]
    @settings(max_examples=15, deadline=None)
    @given(st.floats(0, 1), st.integers(0, 3))
    def check(alpha, edge):
        x = move_background(scenes.obs[6:9], scenes.mask[6:9], a, b, torch.full((3,), alpha), edge).float()
        low, high = (f(f(a.float(), b.float()), scenes.obs[6:9].float()) for f in (torch.minimum, torch.maximum))
        assert (x >= low - .5).all() and (x <= high + .5).all()
    check()


def test_a_bird_stays_in_the_picture():
    "Whatever the frames: as large as it should be or as the picture allows, at the bottom of its spot."
    from hypothesis import given, settings, strategies as st
    side = st.tuples(st.integers(0, 27), st.integers(4, 32)).map(lambda p: (p[0], min(32, p[0] + p[1])))
    @settings(max_examples=40, deadline=None)
    @given(side, side, side, side, st.booleans())
    def check(x, y, to_x, to_y, turn):
        mask = torch.zeros(1, 32, 32, dtype=torch.bool)
        mask[:, y[0]:y[1], x[0]:x[1]] = True
        _, there = lay_birds(mask[:, None].expand(-1, 3, -1, -1).byte(), mask, torch.tensor([[*to_x, *to_y]]).float(), torch.tensor([turn]))
        wide, high = (x[1] - x[0]), (y[1] - y[0])
        scale = min(((to_x[1] - to_x[0]) * (to_y[1] - to_y[0]) / (wide * high))**.5, 32 / wide, to_y[1] / high)
        if min(wide, high) * scale < 3: return                                                   # a few pixels may fall between the grid
        left, right, top, bottom = bird_boxes(there)[0].tolist()
        assert abs(right - left - scale * wide) <= 1.5 and abs(bottom - top - scale * high) <= 1.5 and abs(bottom - to_y[1]) <= 1
    check()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished world model of stage A, as small as they come."
    folder = tmp_path_factory.mktemp('stage_a')
    def run(*args): assert not main(list(args)), args
    run('prepare', 'source=synthetic', 'n=240', 'size=32', f'out_dir={folder}/stills', 'workers=1')
    run('train', 'experiment=demo', f'data_dir={folder}/stills', 'name=a', f'runs_dir={folder}/runs', 'loop.steps=2', 'doctor=false', *SMALL)
    return folder


FAST = ['train.loop={steps: 2, eval_every: 2, progress: false, tensorboard: false}', 'train.batch_size=4', 'train.latent_steps=5', 'images=40', 'judge_images=80', 'head_steps=10', 'resnet18_steps=2',
        'models=[mlp]', 'progress=false']


def test_the_command_goes_on_where_it_was(finished):
    "A row that got lost is computed again and is the same to the bit; what is there stays."
    run = finished/'runs/demo/a'
    args = ['concepts', f'run={run}', *FAST, 'parts=[edits,retrain]', 'edits=[exact,world model]', 'recipes=[as is,world model,DFR]']
    assert not main(args)
    file = run/'concepts/results.json'
    whole = read_json(file)
    assert [r['edit'] for r in whole['edits']] == ['exact', 'world model'] and [r['recipe'] for r in whole['classifiers']] == ['as is', 'world model', 'DFR']
    assert 'Counterfactuals' in (run/'report.md').read_text() and (run/'concepts/figures/world_model.gif').read_bytes()[:3] == b'GIF'
    for cell in (run/'concepts/cells').glob('mlp-world*'): cell.unlink()
    write_json(file, dict(whole, classifiers=[r for r in whole['classifiers'] if r['recipe'] != 'world model'], edits=whole['edits'][:1]))
    assert not main(args)
    again = read_json(file)
    assert again['edits'] == whole['edits'] and sorted(map(str, again['classifiers'])) == sorted(map(str, whole['classifiers']))
    assert not main(['concepts', f'run={run}', *FAST, 'parts=[retrain]', 'recipes=[as is]', 'models=[resnet18]'])
    row = read_json(file)['classifiers'][-1]
    assert row['model'] == 'resnet18' and 0 <= row['worst'] <= row['adjusted'] <= 1 and 'ResNet-18' in (run/'report.md').read_text()


def test_two_processes_find_what_one_finds(finished):
    "The second process trains judges and networks on images; a file that it leaves is read, and what it leaves out is done."
    from dreamer_wb.evaluation.concepts import ConceptsConfig, Study, compose
    args = [f'run={finished}/runs/demo/a', *FAST, 'cnn_steps=3', 'parts=[edits,retrain]', 'edits=[exact]', 'recipes=[as is,world model,exact edits]', 'models=[mlp,cnn]']
    found = {}
    for workers in (1, 2):
        out = finished/f'workers{workers}'
        assert not main(['concepts', *args, f'out={out}', f'workers={workers}'])
        found[workers] = read_json(out/'results.json')
    assert [found[1][k] for k in ('edits', 'classifiers', 'judges')] == [found[2][k] for k in ('edits', 'classifiers', 'judges')]
    study = Study(compose(ConceptsConfig, [*args, f'out={finished}/ahead'], group=None))
    study.ahead()
    assert {p.name for p in (finished/'ahead').rglob('*.pt')} == {'judges.pt', 'cnn-as_is-0.pt', 'cnn-exact_edits-0.pt'}
    assert not study.cells_ahead()
    study.run.close()


@pytest.mark.parametrize('more, words', [
    (['recipes=[world modell]'], 'did you mean `world model`'), (['models=[resnet]'], 'models: no `resnet`'), (['seeds=[]'], 'at least one'), (['severity=9'], 'from 1 to 5'),
    (['data_dir=nowhere'], 'no train/ in there'), (['images=80'], 'images=40, now 80'), (['draws=3'], 'draws=1, now 3'), (['train.meaning=shift'], 'train.meaning=shift')])
def test_what_the_command_refuses(finished, capsys, more, words):
    "One line, and exit status 2."
    folder = finished/'refused'
    folder.mkdir(exist_ok=True)
    settings = dict(seed=0, images=40, judge_images=80, head_steps=10, cnn_steps=380, resnet18_steps=2, looks_per_group=25, severity=3, masks=1., steps=2, data=str(finished/'stills'))
    write_json(folder/'results.json', dict(settings=settings, edits=[], classifiers=[], judges=None))
    assert main(['concepts', f'run={finished}/runs/demo/a', f'out={folder}', *FAST, *more]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and '\n' not in said


def test_stills_without_masks_are_refused(finished, capsys):
    "Photographs that were prepared without segmentations."
    bare = finished/'bare'
    for split in ('train', 'val', 'test'):
        store = EpisodeStore(finished/'stills'/split)
        for i in range(min(40, len(store))): write_episode(bare/split/f'{i:03}.npz', store.images([i])[0][None], np.zeros((1, 1), np.float32), label=int(store.label[i]), place=int(store.place[i]))
    assert main(['concepts', f'run={finished}/runs/demo/a', f'data_dir={bare}', f'out={finished}/none', *FAST]) == 2
    assert 'no image has a mask' in capsys.readouterr().err


def test_a_run_that_is_not_finished(finished, capsys):
    from dreamer_wb.core.config import TrainConfig
    from dreamer_wb.core.runs import Run
    Run.create(TrainConfig(), 'demo', str(finished/'runs'), 'begun').close()
    assert main(['concepts', f'run={finished}/runs/demo/begun']) == 2
    assert 'no finished world model' in capsys.readouterr().err


def test_dynamics_that_cannot_learn_on_latents_alone(finished, capsys):
    "Episodes of edits on disk have no stills to encode."
    assert not main(['prepare', f'stills={finished}/stills', f'out_dir={finished}/edits', 'steps=4'])
    assert main(['train', 'experiment=waterbirds_concept_cpu', f'start={finished}/runs/demo/a', f'data_dir={finished}/edits', f'runs_dir={finished}/runs', 'name=b', 'loop.steps=2', *SMALL[4:]]) == 2
    assert 'give latent_steps=0' in capsys.readouterr().err
