"Managers in runs: what the report shows of them, and what checkpoints keep."
import torch

from dreamer_wb.core.config import compose
from dreamer_wb.core.runs import Run
from dreamer_wb.dreamer.agent import AgentConfig, DreamerAgent, load_agent, save_agent
from dreamer_wb.evaluation.report import run_report

TINY = ['experiment=tiny_director', 'action_dim=5', 'encoder.depth=4', 'decoder.depth=4', 'dynamics.deter=32', 'dynamics.hidden=32', 'heads.units=16', 'behavior.units=16']


def saved(tmp_path, *more):
    torch.manual_seed(0)
    cfg = compose(AgentConfig, [*TINY, *more])
    agent, run = DreamerAgent(cfg, discrete=True), Run.create(cfg, 'agents', tmp_path, 'one')
    if 'behavior.director.clock=value' in more: agent.behavior.remember(torch.randn(64, 10).cumsum(1), torch.ones(64, 10))
    save_agent(agent, run)
    return agent, run


def test_report_shows_goals(tmp_path):
    agent, run = saved(tmp_path)
    (run.path/'metrics.csv').write_text('step,loss,eval_return,env_steps\n1,3.0,,100\n2,2.0,.5,200\n')
    before = torch.random.get_rng_state()
    page = run_report(run).save(run.path).with_suffix('.md').read_text()
    assert torch.equal(before, torch.random.get_rng_state())
    assert 'Goals of the managers' in page and 'steps that one is kept' in page and (run.path/'figures/goals.png').exists()


def test_report_without_the_environment(tmp_path, monkeypatch):
    from dreamer_wb.core.runs import UserError
    from dreamer_wb.dreamer import envs
    def none(*args): raise UserError('no such environment here')
    agent, run = saved(tmp_path)
    monkeypatch.setattr(envs, 'make_envs', none)
    page = run_report(run).save(run.path).with_suffix('.md').read_text()
    assert 'Not shown: no such environment here' in page


def test_a_flat_agent_has_no_goals(tmp_path):
    agent, run = saved(tmp_path, 'behavior.name=flat')
    assert 'Goals of' not in run_report(run).save(run.path).with_suffix('.md').read_text()


def test_the_bar_of_the_value_clock_is_kept(tmp_path):
    agent, run = saved(tmp_path, 'behavior.director.clock=value', 'behavior.director.rate=.2')
    again = load_agent(run.checkpoints/'agent.ckpt')
    bar = again.behavior.bar(1)
    assert torch.equal(bar, agent.behavior.bar(1)) and not torch.isfinite(bar)        # one dream does not fill it
    for _ in range(8): again.behavior.remember(torch.randn(64, 10).cumsum(1), torch.ones(64, 10))
    bar = again.behavior.bar(1)
    save_agent(again, run)
    assert torch.isfinite(bar) and torch.equal(load_agent(run.checkpoints/'agent.ckpt').behavior.bar(1), bar)
