"""Do concept vectors point the right way, which test of TCAV can be trusted, and what do activation maps say of a biased and of a robust classifier?

    python nbs/experiments/concept_evaluation.py                  # everything, about 2 CPU minutes
    python nbs/experiments/concept_evaluation.py --seeds 0 --prepare   # only pictures and networks
    python nbs/experiments/concept_evaluation.py --resnet runs/demo/seed0   # a ResNet-50 at 224 pixels beside classifiers of that run, about 6 CPU minutes
    python nbs/experiments/concept_evaluation.py --retrained runs/demo/*    # small CNNs before and after `dreamer-wb concepts`, about 1 CPU minute for each run

Small CNNs on synthetic Waterbirds of 64 pixels (800 training pictures, 95 % of the birds where one expects them), trained by ERM and by GroupDRO; each seed draws pictures of its
own as well as weights and order. Directions are fitted at the last convolution and in the block before it, from pictures of places without birds, against training pictures of all
sorts or against each other, and compared with what really changes there when the renderer moves the same bird to the other place. What is in the result file already is not repeated.

--resnet is `dreamer-wb evaluate` at full size: TCAV at two layers with shipped concepts and with folders of images, three kinds of maps, all 19 corruptions at 5 severities. The ResNet-50 has the
weights that the demo gave it (from scratch, two epochs at 64 pixels) and 12 more updates at 224 pixels, since ImageNet's may not be at hand; it is there to be measured, not to be good.

--retrained is the same command for the small CNNs that `dreamer-wb concepts` has trained as is, on cut-outs, by GroupDRO and on exact edits: TCAV of place and bird, maps, and the mCE of 15 corruptions
at 5 severities, with the one that was trained as is as the reference.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.classifier.latents import Features
from dreamer_wb.classifier.methods import predict, train_classifier
from dreamer_wb.classifier.metrics import group_counts, group_metrics
from dreamer_wb.classifier.models import small_cnn
from dreamer_wb.concepts.directions import KINDS, activations, cosine, empty_places, true_differences
from dreamer_wb.core.learner import set_seed
from dreamer_wb.core.runs import read_json, write_json
from dreamer_wb.data.episodes import EpisodeStore
from dreamer_wb.data.prepare import PrepareConfig, prepare
from dreamer_wb.data.synthetic import render_many, sample_specs, twin
from dreamer_wb.evaluation.corruptions import stratified
from dreamer_wb.evaluation.evaluate import EvaluateConfig, evaluate, torchvision_classifier
from dreamer_wb.evaluation.gradcam import cam_maps, localisation_table
from dreamer_wb.evaluation.tcav import draw_cavs, layer_gradients, null_cavs, p_values, tcav_scores

OUT = Path(__file__).resolve().parent/'results'/'concept_evaluation.json'
RESNET, RETRAINED = (OUT.with_name(f'concept_evaluation_{k}.json') for k in ('resnet50', 'retrained'))
SIZES, METHODS, LAYERS = (800, 100, 300), ('erm', 'group_dro'), {'last': '13', 'before': '10'}
CONCEPTS = {'water, not land': (1, 0), 'water': (1, None), 'land': (0, None)}


def data(seed, cache):
    "Pictures and masks of all splits, drawn once."
    specs, file = sample_specs(SIZES, seed=seed), cache/f'data{seed}.npz'
    if not file.exists():
        drawn = {k: render_many(s) for k, s in specs.items()}
        np.savez(file, **{f'{k}_x': x.transpose(0, 3, 1, 2) for k, (x, m) in drawn.items()}, **{f'{k}_m': m for k, (x, m) in drawn.items()})
    with np.load(file) as f: arrays = {k: f[k] for k in f}
    return specs, {k: Features(arrays[f'{k}_x'], [i.label for i in s], [i.place for i in s]) for k, s in specs.items()}, arrays['test_m']


def network(method, seed, images, cache):
    "A trained CNN, kept."
    set_seed(seed)
    net, file = small_cnn(), cache/f'{method}{seed}.pt'
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    net = train_classifier(net, images['train'], images['val'], method, seed=seed, epochs=24, progress=False, evals=8).net
    torch.save(net.state_dict(), file)
    return net


def trap(net, seed, specs, images):
    "Directions of each kind: AUC, angle to the truth, TCAV, and what the logit really does."
    sets = {p: empty_places(p, 60, seed=seed) for p in (0, 1)}
    random, birds = images['train'].x[:300], [s for s in specs['test'] if s.label == 1][:80]
    here = {p: render_many([s if s.place == p else twin(s) for s in birds])[0].transpose(0, 3, 1, 2) for p in (0, 1)}
    def score(x): return (lambda z: z[:, 1] - z[:, 0])(np.log(np.maximum(predict(net, Features(x, [1]*len(x), [0]*len(x))), 1e-12)))
    rise, rows = score(here[1]) - score(here[0]), []
    for where, layer in LAYERS.items():
        act = lambda x: activations(net, layer, x)
        truth = true_differences(act, birds).mean(0)
        grads = layer_gradients(net, layer, np.concatenate([here[0], here[1]]))
        for name, (with_, without) in CONCEPTS.items():
            a, b = act(sets[with_]), act(random if without is None else sets[without])
            towards = 1 if with_ else -1
            for kind in KINDS:
                cavs, aucs = draw_cavs(a, b, 10, kind, seed)
                sign, size = tcav_scores(grads, cavs)
                rows.append(dict(layer=where, concept=name, kind=kind, auc=float(aucs.mean()), cosine=float(cosine(cavs, towards*truth).mean()), sign=float(sign.mean()),
                                 sign_sd=float(sign.std()), magnitude=float(size.mean()), truth=float((towards*rise > 0).mean())))
    return rows


def false_positives(net, seed, images, sets=60, n=60, runs=20):
    "How often random sets of pictures are called a concept, level .05."
    x, test = images['train'].x[:700], images['test']
    acts, grads = activations(net, '10', x), layer_gradients(net, '10', test.x[test.label == 1][:100])
    null, rng, found = tcav_scores(grads, null_cavs(acts[:300], n, 199, runs, seed=seed))[1], np.random.default_rng(seed), []
    for i in range(sets):
        order = rng.permutation(len(acts))
        found.append(p_values(tcav_scores(grads, draw_cavs(acts[order[:n]], acts[order[n:]], runs, seed=i)[0])[1], null, 500))
    return {k: float(np.mean([f[k] < .05 for f in found])) for k in found[0]}


def measure(seed, cache):
    "Everything of one seed."
    start, (specs, images, masks) = time.process_time(), data(seed, cache)
    nets = {m: network(m, seed, images, cache) for m in METHODS}
    test, counts = images['test'], group_counts(images['train'].group)
    out = dict(seed=seed, accuracy={}, trap={}, false_positives={})
    for m, net in nets.items():
        found = group_metrics(test.label, predict(net, test), test.group, counts, m)
        out['accuracy'][m] = {k: found[k] for k in ('acc_worst', 'acc_adj', 'acc_mean', 'acc_group_mean')}
        twins = render_many([twin(s) for s in specs['test'][:200]])[0].transpose(0, 3, 1, 2)
        flips = predict(net, Features(twins, test.label[:200], test.place[:200])).argmax(1) != predict(net, Features(test.x[:200], test.label[:200], test.place[:200])).argmax(1)
        out['accuracy'][m]['flip_rate'] = float(flips.mean())
        out['trap'][m] = trap(net, seed, specs, images)
    out['false_positives'] = false_positives(nets['erm'], seed, images)
    pick = stratified(test.group, 40)
    maps = {f'{m}, {cam}': cam_maps(net, test.x[pick], method=cam) for m, net in nets.items() for cam in ('gradcam', 'layercam')}
    out['gradcam'] = localisation_table(maps, masks[pick], test.group[pick]).to_dict('records')
    return dict(out, cpu_seconds=time.process_time() - start)


def own_concepts(cache):
    "Two folders of images: places with water, and stripes of any colours, which should mean nothing to a bird."
    from PIL import Image
    rng, (y, x), folders = np.random.default_rng(0), np.mgrid[:96, :96], [cache/'concepts'/k for k in ('water_places', 'stripes')]
    if all(f.is_dir() for f in folders): return list(map(str, folders))
    for f in folders: f.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(empty_places(1, 40, 96, seed=3).transpose(0, 2, 3, 1)): Image.fromarray(image).save(folders[0]/f'{i:02}.png')
    for i in range(40):
        angle, width, colours = rng.uniform(0, np.pi), rng.uniform(.2, .8), rng.integers(0, 256, (2, 3))
        stripe = (np.sin(width*(x*np.cos(angle) + y*np.sin(angle))) > 0)[..., None]
        Image.fromarray(np.where(stripe, *colours).astype(np.uint8)).save(folders[1]/f'{i:02}.jpg')
    return list(map(str, folders))


def resnet(run, cache):
    "A ResNet-50 at 224 pixels beside two classifiers of a run."
    data, weights, out = cache/'birds224', cache/'resnet50_224.pt', cache/'evaluate'
    prepare(PrepareConfig(source='synthetic', n=800, size=224, out_dir=str(data), seed=7))
    if not weights.exists():
        net = torchvision_classifier('resnet50', run/'classify/cells/resnet50-erm-0.ckpt')
        torch.manual_seed(0)
        trained = train_classifier(net, EpisodeStore(data/'train'), EpisodeStore(data/'val'), steps=12, batch_size=16, evals=1, lr=5e-4, amp='auto')
        torch.save(trained.net[1].state_dict(), weights)
    evaluate(EvaluateConfig(run=str(run), models=['dreamer_mlp', 'small_cnn'], network='resnet50', weights=str(weights), data_dir=str(data), out=str(out), layers=['1.layer2', '1.layer3'],
                            cams=['gradcam', 'gradcam++', 'layercam'], corruptions=['all'], per_group=6, images=32, reference='small_cnn', amp='auto', concepts=['background', 'bird', *own_concepts(cache)]))
    found = read_json(out/'results.json')
    return {k: found[k] for k in ('summary', 'tcav', 'mce')} | dict(gradcam=[r for r in found['gradcam'] if r['group'] == 'all'],
                                                                            corruptions=[{k: r[k] for k in ('model', 'corruption', 'severity', 'error', 'worst')} for r in found['corruptions']])


def retrained(run, cache):
    "Small CNNs before and after."
    out = cache/f'retrained_{run.resolve().name}'
    evaluate(EvaluateConfig(run=str(run), models=[f'cnn-{k}-0' for k in ('as_is', 'cut_outs', 'GroupDRO', 'exact_edits')], reference='cnn-as_is-0', out=str(out), images=80, per_group=5, amp='auto'))
    found = read_json(out/'results.json')
    return {k: found[k] for k in ('accuracy', 'tcav', 'mce')} | dict(gradcam=[r for r in found['gradcam'] if r['group'] == 'all'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='seeds (%(default)s)')
    parser.add_argument('--cache', type=Path, default=Path('runs/concept_evaluation'), help='folder for pictures and networks (%(default)s)')
    parser.add_argument('--out', type=Path, default=OUT, help='result file (%(default)s)')
    parser.add_argument('--prepare', action='store_true', help='only draw the pictures and train the networks')
    parser.add_argument('--resnet', type=Path, help='run folder of `dreamer-wb demo`: only measure a ResNet-50 beside its classifiers')
    parser.add_argument('--retrained', type=Path, nargs='+', help='run folders with finished studies of `dreamer-wb concepts`: only measure their small CNNs')
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.resnet:
        write_json(RESNET, resnet(args.resnet, args.cache))
        raise SystemExit
    if args.retrained:
        write_json(RETRAINED, [retrained(run, args.cache) for run in args.retrained])
        raise SystemExit
    for seed in args.seeds:
        if args.prepare:
            _, images, _ = data(seed, args.cache)
            for m in METHODS: network(m, seed, images, args.cache)
            continue
        done = read_json(args.out) if args.out.exists() else []
        if seed in [r['seed'] for r in done]: continue
        found = measure(seed, args.cache)
        done = read_json(args.out) if args.out.exists() else []
        write_json(args.out, sorted([*done, found], key=lambda r: r['seed']))
        print(seed, f'{found["cpu_seconds"]:.0f} CPU seconds', found['accuracy'], found['false_positives'], flush=True)
