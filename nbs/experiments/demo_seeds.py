"""The demo over several seeds: pictures, weights and data order all differ from seed to seed.

    dreamer-wb demo seed=0,1,2 -m
    python nbs/experiments/demo_seeds.py runs/demo/*

Reads what the runs left in their folders and writes nbs/experiments/results/demo.json: means and 95 % Student intervals over the seeds.
"""
import argparse
from pathlib import Path

from dreamer_wb.classifier.metrics import seed_interval
from dreamer_wb.core.runs import Run, read_json, write_json

OUT = Path(__file__).resolve().parent/'results'/'demo.json'


def over_seeds(values):
    "Mean and interval of one number per seed."
    low, high = seed_interval(values)
    return dict(mean=sum(values)/len(values), low=low, high=high, values=values)


def collect(folders):
    "All figures of the runs, by what they measure."
    runs = [Run.open(f) for f in folders]
    results = [read_json(r.path/'classify/results.json') for r in runs]
    world = [read_json(r.path/'world_model.json') for r in runs]
    rows = []
    for i, first in enumerate(results[0]['table']):
        same = [r['table'][i] for r in results]
        assert all((s['model'], s['method']) == (first['model'], first['method']) for s in same), 'the runs compare different classifiers'
        rows.append(dict(name=first['name'], model=first['model'], method=first['method'], groups=first['groups'], selection=first['selection'],
                         **{k: over_seeds([s[k] for s in same]) for k in ('acc_worst', 'acc_adj', 'cpu_seconds')}))
    probes = [dict(features=p['features'], target=p['target'], acc=over_seeds([r['probes'][i]['acc'] for r in results])) for i, p in enumerate(results[0]['probes'])]
    stages = {k: over_seeds([r.stages()[k]['cpu_seconds'] for r in runs]) for k in runs[0].stages()}
    config = {k: v for k, v in runs[0].config.items() if not k.endswith('_dir') and k not in ('name', 'seed')}
    return dict(seeds=[r.config['seed'] for r in runs], world_model={k: over_seeds([w[k] for w in world]) for k in world[0]}, table=rows, probes=probes,
                stages=stages, config=config, counts=results[0]['counts'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', help='run folders of the demo, one for each seed')
    parser.add_argument('--out', type=Path, default=OUT, help='result file (%(default)s)')
    args = parser.parse_args()
    write_json(args.out, collect(args.runs))
    print(args.out)
