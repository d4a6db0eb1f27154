"""Growing regularisation: equal to a loop by hand, bit for bit, and to what can be said in closed form."""

import copy
import math

import pytest
import torch
import transformers as hf
from torch import nn
from trainings import Net, assert_same, config, exact_model, make_trainer, samples, tiny_model

from hap_hf import ConfigError, Distill, GrowingReg, HessianPruner, Role, find_groups, plan_of, prune
from hap_hf.trainer.growing import increments, phases

SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "linear", "max_grad_norm": 0.0}


class Weights(hf.TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}


def slices(group, on):
    wanted = {Role.CONSUMER} if on == "read" else {Role.PRODUCER, Role.FACTOR, Role.ALIGNED}
    return [s for s in group.slices if s.role in wanted]


def pruned_units(report):
    return [(g.group, [u for u, a in enumerate(g.actions) if a == "p"]) for g in report.plan if "p" in g.actions]


FORMS = {
    "read": {"increment": 0.05},
    "rows": {"on": "rows", "increment": 0.05},
    "coupled": {"on": "rows", "increment": 0.05, "coupled": True},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_loop_by_hand_ends_with_the_same_weights_bit_for_bit(tmp_path, name):
    settings = {"interval": 2, "stabilise": 0.25, **FORMS[name]}
    growing = GrowingReg(steps=8, ratio=1e9, **settings)
    pruner, look = HessianPruner(config(method="magnitude"), step=10, regularise=growing), Weights()
    make_trainer(tmp_path, exact_model(), pruner, look, max_steps=11, **SGD).train()

    # By hand: the same batches, and SGD on them.
    batches = []

    def collator(features):
        batches.append(hf.default_data_collator(features))
        return batches[-1]

    make_trainer(tmp_path, exact_model(), max_steps=11, data_collator=collator, **SGD).train()
    model, on = exact_model().train(), settings.get("on", "read")
    units, penalty = pruned_units(pruner.reports[0]), 0.0
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(10):
        rate = sgd.param_groups[0]["lr"] = 0.05 * ((11 - step) / 11)
        sgd.zero_grad()
        model(**batches[step]).loss.backward()
        now = step - 2
        if now >= 0 and now % 2 == 0 and now < 6:
            penalty += 0.05
        parts = [(model.get_parameter(s.tensor), s, u) for group, us in units for s in slices(group, on) for u in us]
        with torch.no_grad():
            if now >= 0 and settings.get("coupled"):
                for p, s, u in parts:
                    p.grad.movedim(s.dim, 0)[list(s.indices(u))] += penalty * p.movedim(s.dim, 0)[list(s.indices(u))]
            sgd.step()
            if now >= 0 and not settings.get("coupled"):
                for p, s, u in parts:
                    p.movedim(s.dim, 0)[list(s.indices(u))] *= 1 - rate * penalty
        if step < 9:
            for n, p in model.named_parameters():
                torch.testing.assert_close(look.after[step + 1][n], p, rtol=0, atol=0, msg=f"{step} {n}")
    assert penalty > 0
    assert units


def test_without_a_loss_the_ratio_is_reached_exactly_as_the_increments_say():
    settings = GrowingReg(steps=400, ratio=1000.0, interval=10, stabilise=0.0)
    rates = [0.01 * (1 - t / 800) for t in range(400)]
    _, increment = increments(settings, rates)
    product = math.prod(1 - rates[t] * increment * (t // 10 + 1) for t in range(400))
    assert 1000 <= 1 / product < 1200
    # Constant rate, many steps: 2 K ln(r) / (lr T^2)
    _, constant = increments(GrowingReg(steps=20000, interval=10, stabilise=0.0), [0.01] * 20000)
    assert constant == pytest.approx(2 * 10 * math.log(1000) / (0.01 * 20000**2), rel=1e-3)
    # A longer phase to settle leaves less time to grow in.
    _, settled = increments(GrowingReg(steps=20000, interval=10, stabilise=0.5), [0.01] * 20000)
    assert settled == pytest.approx(4 * constant, rel=2e-3)
    assert phases(GrowingReg(steps=100, variant=2, picking=0.2, stabilise=0.3), 100) == (20, 50)


CURVATURE = torch.logspace(0, 1, 8).double()[torch.tensor([3, 6, 0, 5, 1, 7, 2, 4])]
TARGET = torch.linspace(0.6, 1.4, 8).double()[torch.tensor([1, 5, 2, 0, 7, 3, 6, 4])]
"""The curvature and the best value of the weights that read each unit."""


class Quadratic(nn.Module):
    """A loss of 1/2 h (w - w0)^2 for each weight that reads a unit: the units are independent."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(8, 8, bias=False).double() for _ in range(2))
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(8))
            self.down.weight.copy_(TARGET.expand(8, 8))
        self.up.requires_grad_(False)

    def forward(self, x, labels=None):
        answers = self.down(torch.relu(self.up(x)))
        return {"loss": (answers - labels).square().sum() / 2, "logits": answers}


def quadratic(tmp_path, growing, method="magnitude"):
    """Return the weights before the cut, and the units that went."""
    data = [{"x": CURVATURE[i].sqrt() * torch.eye(8).double()[i], "labels": CURVATURE[i].sqrt() * TARGET[i].expand(8)}
            for i in range(8)]  # fmt: skip
    look = Weights()
    asked = config(method=method, prune_ratio=0.5, compensate=False)
    pruner = HessianPruner(asked, step=growing.steps, regularise=growing)
    changes = {**SGD, "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": growing.steps}
    trainer = make_trainer(tmp_path, Quadratic(), pruner, look, data=data, remove_unused_columns=False, **changes)
    trainer.train()
    ((_, units),) = pruned_units(pruner.reports[0])
    return look.after[growing.steps - 1]["down.weight"][0], units, pruner.reports[0]


def test_a_quadratic_loss_ends_where_penalty_and_curvature_balance(tmp_path):
    settings = {"steps": 200, "ratio": 1e9, "interval": 1, "stabilise": 0.95, "increment": 0.1, "coupled": True}
    now, units, _ = quadratic(tmp_path, GrowingReg(**settings))
    penalty = torch.zeros(8).double()
    penalty[units] = 0.1 * 10
    expected = CURVATURE * TARGET / (CURVATURE + penalty)
    torch.testing.assert_close(now, expected, rtol=1e-6, atol=0)
    assert (expected - TARGET).abs().max() > 0.1


def test_the_second_variant_picks_by_what_the_penalty_reveals_of_the_curvature(tmp_path):
    settings = {"interval": 1, "stabilise": 0.2, "picking": 0.5, "increment": 0.2, "recover": 0.0}
    _, units, report = quadratic(tmp_path, GrowingReg(steps=200, variant=2, ratio=1e9, **settings), "taylor")
    penalty = 0.1 * 0.02 * 100  # the learning rate times a tenth of the increment, a hundred times
    # Where a step of the loss and one of shrinking balance.
    step = 0.1 * CURVATURE
    revealed = ((1 - penalty) * step * TARGET / (1 - (1 - penalty) * (1 - step))).abs()
    assert sorted(units) == sorted(revealed.argsort()[:4].tolist())
    assert sorted(units) != sorted(TARGET.abs().argsort()[:4].tolist())
    assert report.method.startswith("magnitude")


def test_the_cut_costs_nothing_once_units_have_shrunk(tmp_path):
    jumps = {}
    for ratio in (1.5, 100.0, 1e5):
        growing = GrowingReg(steps=40, ratio=ratio, interval=1)
        pruner = HessianPruner(config(method="magnitude", compensate=False), step=45, regularise=growing, batches=None)
        make_trainer(tmp_path, exact_model(), pruner, max_steps=46, learning_rate=1e-3).train()
        (report,) = pruner.reports
        jumps[ratio] = abs(report.loss_after - report.loss_before)
        assert report.to_log()["prune_loss_before"] == report.loss_before
        assert "loss right before and after the cut" in str(report)
    assert jumps[1e5] < 1e-4 < jumps[1.5]


def grown(folder, model=None, *callbacks, regularise=None, rounds=None, **changes):
    growing = GrowingReg(**{"steps": 4, "ratio": 50.0, "interval": 1, **(regularise or {})})
    rounds = {"step": 5, "num_rounds": 2, "interval": 5, **(rounds or {})}
    pruner = HessianPruner(config(method="taylor"), regularise=growing, **rounds)
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, **changes}
    return pruner, make_trainer(folder, model or tiny_model(), pruner, *callbacks, **settings)


@pytest.mark.parametrize("variant", [1, 2])
def test_a_resumed_training_ends_as_if_it_had_not_been_interrupted(tmp_path, variant):
    regularise = {"variant": variant, "steps": 5}
    pruner, whole = grown(tmp_path, None, Distill(), regularise=regularise)
    whole.train()
    assert len(plan_of(whole.model).stages) == 2
    # While all shrink or those that were chosen, and at a cut, with which the next growth begins.
    for step in (1, 5):
        again, resumed = grown(tmp_path, None, Distill(), regularise=regularise)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(resumed.model, whole.model)
        for one, other in zip(pruner.reports, again.reports, strict=True):
            assert {**one.to_dict(), "seconds": 0} == {**other.to_dict(), "seconds": 0}


def test_units_that_stay_and_layers_that_are_left_whole_do_not_shrink(tmp_path):
    look = Weights()
    growing = GrowingReg(steps=4, interval=1, ratio=1e4)
    pruner = HessianPruner(config(method="magnitude", kinds="ffn"), step=4, regularise=growing)
    settings = {"learning_rate": 1e-30, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 5}
    make_trainer(tmp_path, exact_model(), pruner, look, **settings).train()
    before, after = look.after[0], look.after[3]
    gone = {
        (s.tensor, i)
        for g, us in pruned_units(pruner.reports[0])
        for s in slices(g, "read")
        for u in us
        for i in s.indices(u)
    }
    for name, p in after.items():
        columns = sorted(i for n, i in gone if n == name)
        rest = [i for i in range(p.shape[-1]) if i not in columns]
        assert torch.equal(p[..., rest], before[name][..., rest])
        if columns:
            assert (p[..., columns].abs() < before[name][..., columns].abs()).all()


def test_frozen_weights_shrink_with_the_usual_rate_and_are_cut(tmp_path):
    model = exact_model()
    for name, p in model.named_parameters():
        p.requires_grad_("output.dense" not in name)
    growing = GrowingReg(steps=6, interval=1, ratio=1e6)
    pruner = HessianPruner(config(method="magnitude", compensate=False), step=6, regularise=growing)
    make_trainer(tmp_path, model, pruner, max_steps=7).train()
    (report,) = pruner.reports
    assert abs(report.loss_after - report.loss_before) < 1e-4


def test_a_training_that_failed_leaves_nothing_for_the_next_one(tmp_path):
    class Stop(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and stop:
                raise RuntimeError("stopped")

    stop = [1]
    pruner, trainer = grown(tmp_path, Net(), Stop(), rounds={"num_rounds": 1}, max_steps=6, save_strategy="no")
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    stop.clear()
    second = make_trainer(tmp_path, Net(), pruner, max_steps=6)
    second.train()
    fresh, third = grown(tmp_path, Net(), rounds={"num_rounds": 1}, max_steps=6, save_strategy="no")
    third.train()
    assert_same(second.model, third.model)
    assert len(fresh.reports) == 1


WRONG = {
    "step=10 or more, or GrowingReg.steps=5. or fewer": {"step": 5},
    "interval=10 or more, or GrowingReg.steps=4. or fewer": {"step": 10, "num_rounds": 2, "interval": 4},
    "so step=... must say when it comes": {},
    "which rounds small steps of shrinking away": {"step": 10, "half": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_leaves_no_time_to_shrink_is_refused_before_the_training(tmp_path, message):
    rounds = dict(WRONG[message])
    model = exact_model().bfloat16() if rounds.pop("half", False) else exact_model()
    before = copy.deepcopy(model)

    def train():
        pruner = HessianPruner(config(), regularise=GrowingReg(steps=10), **rounds)
        make_trainer(tmp_path, model, pruner, max_steps=20).train()

    with pytest.raises(ConfigError, match=message):
        train()
    assert_same(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": 3}, "variant must be 1 or 2"),
        ({"steps": 0}, "steps must be an integer of at least 1, or a share"),
        ({"ratio": 1.0}, "ratio must be a number above 1"),
        ({"coupled": True}, "coupled=True needs an increment"),
        ({"variant": 2, "picking": 0.7, "stabilise": 0.3}, "leave no steps in between"),
        ({"on": "columns"}, "on must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GrowingReg(**settings)
    with pytest.raises(ConfigError, match="has no setting 'step'"):
        GrowingReg.from_dict({"step": 4})
    assert GrowingReg.from_dict(GrowingReg(on="rows").to_dict()) == GrowingReg(on="rows")


def test_pruning_by_hand_after_the_same_steps_gives_the_same_plan(tmp_path):
    """The choice is that of the beginning of the growth, whatever becomes of the weights since."""
    model = exact_model()
    expected = prune(copy.deepcopy(model), [hf.default_data_collator(samples())], config(method="magnitude"))
    growing = GrowingReg(steps=3, interval=1)
    pruner = HessianPruner(config(method="magnitude"), step=3, regularise=growing)
    trainer = make_trainer(tmp_path, model, pruner, max_steps=4)
    trainer.train()
    assert pruner.reports[0].plan.stages == expected.plan.stages
    assert find_groups(trainer.model, hf.default_data_collator(samples()))
