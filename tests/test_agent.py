"""The agent as a whole: killed without warning, any dynamics, any environment, half precision; the replay against a plain list."""
import os
import signal
import subprocess
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer_wb.core.config import compose
from dreamer_wb.core.runs import UserError, load_checkpoint, read_metrics
from dreamer_wb.data.episodes import read_episode
from dreamer_wb.dreamer import agent as agent_module
from dreamer_wb.dreamer.agent import AgentConfig, DreamerAgent, Replay, env_steps, train_agent, write_video
from dreamer_wb.dreamer.envs import ATARI_100K, EnvConfig, Stream, evaluate, make_env, make_envs, random_policy, scripted_policy

SMALL = ['experiment=tiny_pixels', 'encoder.depth=4', 'decoder.depth=4', 'dynamics.deter=16', 'dynamics.hidden=16', 'dynamics.blocks=2', 'dynamics.stoch=4', 'heads.units=8',
         'behavior.units=8', 'behavior.horizon=3', 'behavior.starts=0', 'env.n=2', 'prefill=60', 'batch_size=4', 'batch_length=8', 'train_ratio=8', 'loop.log_every=5',
         'loop.eval_every=20', 'eval_episodes=1', 'loop.tensorboard=false', 'loop.progress=false', 'loop.checkpoint_seconds=0', 'loop.amp=off']


def config(folder, *more): return compose(AgentConfig, [*SMALL, f'runs_dir={folder}', 'name=one', *more])


# ---------------------------------------------------------------- replay

def rows(n, steps, seed):
    "Random rows of n environments: episodes of all lengths, over or cut off."
    rng, over = np.random.default_rng(seed), np.ones(n, bool)
    for t in range(steps):
        first = over
        over = ~first & (rng.random(n) < .15)
        yield dict(obs=rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8), act=rng.random((n, 2)).astype(np.float32), rew=rng.random(n).astype(np.float32),
                   done=over & (rng.random(n) < .5), first=first, last=over)


@settings(max_examples=15)
@given(steps=st.integers(1, 120), lanes=st.integers(1, 3), room=st.integers(12, 60), stop=st.integers(0, 119), seed=st.integers(0, 99))
def test_replay_is_a_list_and_survives(tmp_path_factory, steps, lanes, room, stop, seed):
    "What is in the ring is what a list of rows ends with; a replay that is read back as of row `stop` holds what it held then, although the files went on growing."
    folder = tmp_path_factory.mktemp('replay')
    replay = Replay(folder, room*lanes, lanes, 8, 2, 3, 5, piece=7)
    state, kept = None, []
    for t, row in enumerate(rows(lanes, steps, seed)):
        replay.add(row)
        kept.append(row)
        if t == stop: state, frozen = replay.state_dict(), {k: v.copy() for k, v in replay.data.items()}
    for back, row in enumerate(kept[-room:][::-1]):
        at = (steps - 1 - back) % replay.room
        assert (replay.data['obs'][:, at] == row['obs'].transpose(0, 3, 1, 2)).all()
        for k in ('act', 'rew', 'done', 'first'): assert (replay.data[k][:, at] == row[k]).all()
    if state is None or steps - stop - 1 > room - replay.piece: return                  # the run went on so long that it has forgotten: no checkpoint is that old
    again = Replay(folder, room*lanes, lanes, 8, 2, 3, 5, piece=7)
    if steps > room and stop + 1 < steps:
        lost = any(min(s for s, _ in replay.files(lane)) > max(0, stop + 1 - room) for lane in range(lanes))
        if lost:
            with pytest.raises(UserError, match='missing'): again.load_state_dict(state)
            return
    again.load_state_dict(state)
    have = np.arange(max(0, again.t - room), again.t) % replay.room
    for k, v in frozen.items(): assert (again.data[k][:, have] == v[:, have]).all(), k
    for lane in range(lanes):
        assert all(start < again.t for start, _ in again.files(lane))
        for start, path in again.files(lane): assert start + len(read_episode(path)['rew']) <= again.t


def test_window_sees_whole_episodes(tmp_path):
    "A window over the end of an episode says where the next one begins; the reward of the first row is 0."
    stream = Stream(make_envs(EnvConfig('dreamer_wb/Reach-v0', n=1, steps=4), 16))
    replay, row, policy = Replay(tmp_path, 60, 1, 16, 5, 2, 12), stream.reset(), random_policy(stream)
    for _ in range(30):
        replay.add(row)
        row = stream.step(policy(row))
    window = replay.window(np.array([0]), np.array([5]), 10)
    assert window['first'][0].tolist() == [True, False, False, False, False, True, False, False, False, False]
    assert window['rew'][0, 5] == 0 and window['act'][0, 5].sum() == 0 and window['act'][0, 6].sum() == 1


# ---------------------------------------------------------------- killed

SCRIPT = '''
import sys, time
sys.path.insert(0, sys.argv[3] + '/tests')
from test_agent import config
from dreamer_wb.dreamer.agent import train_agent
from fastai.basics import Callback
class Slow(Callback):
    order = 99
    def after_batch(self):
        print(self.learn.train_iter, flush=True)
        if self.learn.train_iter >= int(sys.argv[2]): time.sleep(60)
train_agent(config(sys.argv[1], 'loop.steps=40', 'loop.checkpoint_seconds=0.3'), cbs=[Slow()])
'''


def test_kill_nine_and_go_on(tmp_path, checkout):
    "`kill -9` in the middle; the same command goes on with every step of its last checkpoint, and ends with the counts of a run that was never killed."
    process = subprocess.Popen([sys.executable, '-c', SCRIPT, str(tmp_path), '17', str(checkout)], cwd=checkout, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 17: break
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    folder, cfg = tmp_path/'tiny_pixels'/'one', config(tmp_path, 'loop.steps=40', 'loop.checkpoint_seconds=100')
    saved = load_checkpoint(folder/'checkpoints'/'last.ckpt')
    step, held = saved['meta']['step'], saved['state']['callbacks']['collect']['replay']
    assert 0 < step <= 17 and held['t']*2 == env_steps(cfg, step)                       # what it counts depends on the step alone
    seen, load = [], Replay.load_state_dict
    def watched(self, state):
        load(self, state)
        seen.append((self.t, self.data['rew'][:, :self.t].copy(), self.data['obs'][:, :self.t].astype(float).sum()))
    agent_module.Replay.load_state_dict = watched
    try: run = train_agent(cfg)
    finally: agent_module.Replay.load_state_dict = load
    t, rew, pixels = seen[0]
    assert len(seen) == 1 and t == held['t']
    files = [read_episode(p) for p in sorted((folder/'replay').glob('*.npz'))]
    assert sum(len(f['rew']) for f in files) == env_steps(cfg, 40)                      # nothing is lost, nothing is there twice
    df = read_metrics(run)
    assert df['step'].tolist() == sorted(set(df['step'])) and df['step'].iloc[-1] == 40 and df['env_steps'].max() == env_steps(cfg, 40)
    assert [p.name for p in sorted(run.videos.iterdir())] == ['eval_iter_20_ep_0.mp4', 'eval_iter_40_ep_0.mp4']
    state = load_checkpoint(folder/'checkpoints'/'last.ckpt')['state']
    whole = Replay(folder/'replay', cfg.capacity, 2, 16, 5, 4, 8)
    whole.load_state_dict(state['callbacks']['collect']['replay'])
    assert (whole.data['rew'][:, :t] == rew).all() and whole.data['obs'][:, :t].astype(float).sum() == pixels
    assert whole.data['first'][:, t].all()                                              # the open episode was cut off there


def test_killed_before_the_first_checkpoint(tmp_path):
    "Files of a run that never came to a checkpoint are not taken for its own."
    cfg = config(tmp_path, 'loop.steps=3', 'loop.checkpoint_seconds=1000')
    left = Replay(tmp_path/'tiny_pixels'/'one'/'replay', 400, 2, 16, 5, 4, 8)
    stream = Stream(make_envs(EnvConfig('dreamer_wb/Reach-v0', n=2), 16))
    row, policy = stream.reset(), random_policy(stream)
    for _ in range(200):
        left.add(row)
        row = stream.step(policy(row))
    run = train_agent(cfg)
    assert sum(len(read_episode(p)['rew']) for p in (run.path/'replay').glob('*.npz')) == env_steps(cfg, 3)


# ---------------------------------------------------------------- learning

def test_half_precision_trains_the_actor():
    "A dream casts the actor's weights without gradient; the loss must not be given these."
    torch.manual_seed(0)
    agent = DreamerAgent(config('.', 'action_dim=5'), True)
    batch = dict(obs=torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8), act=torch.randn(2, 8, 5), rew=torch.randn(2, 8),
                 done=torch.zeros(2, 8, dtype=torch.bool), first=torch.arange(8).expand(2, 8) == 0)
    grads = []
    for on in (False, True):
        torch.manual_seed(1)
        agent.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=on): losses, _ = agent(batch)
        sum(v.float().mean() for v in losses.values()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in agent.behavior.actor.parameters()]))
    assert all(g.abs().sum() > 0 for g in grads)


def test_world_learns_nothing_from_the_actor():
    "Without replayed critic the world model's gradients are those of its own losses, whichever way the actor learns."
    torch.manual_seed(0)
    batch = dict(obs=torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8), act=torch.randn(2, 8, 2), rew=torch.randn(2, 8),
                 done=torch.zeros(2, 8, dtype=torch.bool), first=torch.arange(8).expand(2, 8) == 0)
    for grad in ('reinforce', 'dynamics'):
        agent = DreamerAgent(config('.', 'action_dim=2', 'behavior.replay_critic=0', f'behavior.actor_grad={grad}', 'dynamics.latent=gaussian'), False)
        found = []
        for names in (['actor', 'critic'], ['image', 'dyn', 'rep', 'reward', 'cont']):
            agent.zero_grad()
            losses = agent(batch)[0]
            sum(losses[k].mean() for k in names).backward()
            found.append((sum(float(p.grad.abs().sum()) for p in agent.world.parameters() if p.grad is not None),
                          sum(float(p.grad.abs().sum()) for p in agent.behavior.parameters() if p.grad is not None)))
        assert found[0][0] == 0 and found[0][1] > 0 and found[1][0] > 0 and found[1][1] == 0, grad


@pytest.mark.parametrize('more', [['dynamics.latent=gaussian'], ['dynamics.name=hierarchy', 'dynamics.hierarchy.clock=learned'],
                                  ['dynamics.name=hierarchy', 'dynamics.hierarchy.clock=fixed', 'dynamics.hierarchy.levels=3'],
                                  ['env.name=Pendulum-v1', 'size=16', 'env.steps=20', 'behavior.actor_grad=dynamics']])
def test_any_dynamics_and_action(tmp_path, more):
    run = train_agent(config(tmp_path, 'loop.steps=4', 'loop.eval_every=4', 'video=false', *more))
    assert np.isfinite(read_metrics(run)[['loss', 'actor', 'critic', 'eval_return']].iloc[-1]).all()


def test_live_curve_in_a_kernel(tmp_path):
    "A real Jupyter kernel, drawing with Agg as in our Docker image: one picture, drawn again after every evaluation, by environment steps; without a notebook none."
    pytest.importorskip('ipykernel')
    from jupyter_client.manager import start_new_kernel
    train = f"""if True:
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_agent, dreamer_wb.dreamer.agent as module
        plot = module.plot_learning
        def watched(rows, lines):
            fig = plot(rows, lines)
            print('drawn', *map(int, fig.axes[0].lines[-2].get_xdata()), fig.axes[0].get_xlabel())
            return fig
        module.plot_learning = watched
        module.train_agent(test_agent.config({str(tmp_path)!r}, 'loop.steps=6', 'loop.eval_every=2', 'video=false', 'name=' + type(get_ipython()).__name__),
                           cbs=[module.live_callback({{'optimum': 14.3}})])"""
    manager, client = start_new_kernel(env={**os.environ, 'DREAMER_WB_PROGRESS': '1'})
    shown, said = [], []
    def note(message):
        kind, content = message['msg_type'], message['content']
        if kind == 'stream': said.append(content['text'])
        if kind in ('display_data', 'update_display_data') and 'image/png' in content['data']: shown.append((kind, content['transient']['display_id'], content['data']['image/png']))
    try: reply = client.execute_interactive(train, output_hook=note, timeout=300)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply['content']['status'] == 'ok', reply['content']
    assert [kind for kind, _, _ in shown] == ['display_data'] + ['update_display_data']*2 and len({where for _, where, _ in shown}) == 1
    pictures = [plt.imread(BytesIO(b64decode(png))) for _, _, png in shown]
    assert all(p.shape[0] > 100 and p[..., :3].std() > .05 for p in pictures) and not np.array_equal(pictures[0], pictures[-1])
    steps = [env_steps(config(tmp_path), u) for u in (2, 4, 6)]
    drawn = [line for line in ''.join(said).splitlines() if line.startswith('drawn')]
    assert drawn == [f"drawn {' '.join(map(str, steps[:i]))} environment steps" for i in (1, 2, 3)]


def test_no_live_curve_in_a_terminal(tmp_path, monkeypatch):
    import IPython.display
    monkeypatch.setattr(IPython.display, 'display', lambda *a, **kw: pytest.fail('nobody is there to see it'))
    monkeypatch.setattr(agent_module, 'bar_place', lambda: 'terminal')
    train_agent(config(tmp_path, 'loop.steps=2', 'loop.eval_every=2', 'video=false'), cbs=[agent_module.live_callback()])


# ---------------------------------------------------------------- environments

def test_atari_100k_is_what_the_wrapper_does():
    "ale-py's vector environment with our arguments, and gymnasium's AtariPreprocessing: same actions, same rewards, nearly the same pictures."
    pytest.importorskip('cv2')
    vector, single = make_envs(EnvConfig('ALE/Breakout-v5', n=1)), make_env('ALE/Breakout-v5')
    assert vector.single_observation_space == single.observation_space and ATARI_100K['reward_clipping'] is False
    noop = dict(ATARI_100K, noop_max=0)
    from ale_py.vector_env import AtariVectorEnv
    from gymnasium.wrappers import AtariPreprocessing
    import gymnasium
    a = AtariVectorEnv('breakout', 1, img_height=64, img_width=64, **noop)
    b = AtariPreprocessing(gymnasium.make('ALE/Breakout-v5', frameskip=1, repeat_action_probability=0.), noop_max=0, frame_skip=4, screen_size=64, grayscale_obs=False)
    x, y = a.reset(seed=0)[0][0, 0], b.reset(seed=0)[0]
    rng, gaps, gains = np.random.default_rng(0), [], []
    for t in range(150):
        gaps.append(np.abs(x.astype(int) - y).mean())
        act = 1 if t % 10 == 0 else int(rng.integers(4))
        x, r = (v[0] for v in a.step(np.array([act]))[:2])
        x = x[0]
        y, s, *_ = b.step(act)
        gains.append((float(r), float(s)))
    assert np.mean(gaps) < 1 and [g[0] for g in gains] == [g[1] for g in gains] and sum(g[0] for g in gains) > 0


def test_pendulum_is_drawn_as_rendered():
    pytest.importorskip('pygame'), pytest.importorskip('cv2')
    from dreamer_wb.dreamer.envs import compare_drawings
    for size in (32, 64, 96):
        for arrow in (False, True): assert compare_drawings(12, size, arrow)['difference'] < .5, (size, arrow)


def test_dmc_walker_walks():
    pytest.importorskip('dm_control')
    try: stream = Stream(make_envs(EnvConfig('dmc_walker_walk', n=1, repeat=2, steps=40), 64))
    except UserError as e: pytest.skip(str(e))          # no renderer on this machine: the error says how to get one
    found = evaluate(stream, random_policy(stream), 1)
    assert found['frames'].shape[1:] == (64, 64, 3) and found['frames'].std() > 10 and 0 < found['returns'][0] < 40 and found['lengths'] == [20]


def test_dmc_lives_beside_triton(run_python):
    "The renderer's LLVM is loaded before Triton's, unless we see to it, and then PyTorch's first optimizer is a segmentation fault."
    pytest.importorskip('dm_control'), pytest.importorskip('triton')
    done = run_python('-c', "from dreamer_wb.dreamer.envs import *; from dreamer_wb.core.runs import UserError\n"
                            "try: s = Stream(make_envs(EnvConfig('dmc_walker_walk', n=1, steps=4), 32), 0); s.reset()\n"
                            "except UserError: pass                               # no renderer here\n"
                            "import torch; torch.optim.AdamW([torch.zeros(1, requires_grad=True)]); print('lives')")
    assert 'lives' in done.stdout and done.returncode == 0, done.stderr


def test_scripted_beats_random():
    for name, gap in (('dreamer_wb/Reach-v0', 10), ('Pendulum-v1', 700)):
        stream = Stream(make_envs(EnvConfig(name, n=5), 16))
        good, bad = (np.mean(evaluate(stream, p(stream), 10)['returns']) for p in (scripted_policy, random_policy))
        assert good - bad > gap


def test_missing_extras_are_named(monkeypatch):
    for module, name, extra in (('cv2', 'CartPole-v1', 'envs'), ('dm_control', 'dmc_walker_walk', 'dmc'), ('ale_py', 'ALE/Breakout-v5', 'atari')):
        monkeypatch.setitem(sys.modules, module, None)
        if module == 'ale_py':
            import gymnasium
            monkeypatch.setattr(gymnasium.envs.registration, 'registry', {k: v for k, v in gymnasium.registry.items() if not k.startswith('ALE/')})
            monkeypatch.setattr(gymnasium, 'registry', gymnasium.envs.registration.registry)
        with pytest.raises(UserError, match=rf'dreamer_wb\[{extra}\]') as e: make_env(name)
        assert '\n' not in str(e.value)


def test_video_without_ffmpeg(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    monkeypatch.setitem(sys.modules, 'imageio_ffmpeg', None)
    assert write_video(tmp_path/'a.mp4', frames).suffix == '.gif'
    from PIL import Image
    assert Image.open(tmp_path/'a.gif').n_frames == 5


def test_report_of_an_agent_is_about_the_agent(tmp_path):
    from dreamer_wb.core.runs import Run
    from dreamer_wb.evaluation.report import run_report
    run = Run.create({'behavior': {}, 'seed': 0}, 'agents', tmp_path, 'one')
    (run.path/'metrics.csv').write_text('step,loss,eval_return,env_steps\n1,3.0,,100\n2,2.0,-5.5,200\n')
    page = run_report(run).save(run.path).with_suffix('.md').read_text()
    assert '-5.5' in page and '200' in page and 'probe' not in page
