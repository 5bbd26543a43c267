"""Layers by path pattern: what a pattern names, what the hooks keep, and that nothing of a model is left changed."""

from __future__ import annotations

import copy
import doctest
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kdfast import Distiller
from kdfast.methods import Term
from kdfast.methods import layers as module
from kdfast.methods.layers import Capture, Pattern, expand, matching, parse, unwrapped


class Block(nn.Module):
    """Returns a tuple, as layers of transformers do, and takes what it needs by name."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.output = nn.Linear(4, 4)

    def forward(self, hidden, scale=1.0):
        return self.output(self.query(hidden)) * scale, hidden


class Model(nn.Module):
    def __init__(self, depth=3, reentrant=None, shared=False):
        super().__init__()
        self.embeddings = nn.Linear(2, 4)
        blocks = [Block()] * depth if shared else [Block() for _ in range(depth)]
        self.layer = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x):
        states = [self.embeddings(x)]
        for block in self.layer:
            if self.reentrant is None:
                states.append(block(hidden=states[-1])[0])
            else:
                states.append(checkpoint(block, states[-1], use_reentrant=self.reentrant)[0])
        return SimpleNamespace(
            logits=self.head(states[-1]),
            hidden_states=tuple(states),
            named={"first": states[0], "last": states[-1]},
            size=7,
        )


def captured(model, *patterns, x=None, detach=False):
    capture = Capture(model, patterns, "student", detach=detach)
    try:
        out = model(torch.randn(5, 2) if x is None else x)
        return capture.take(), out
    finally:
        capture.remove()


# --- Patterns ---------------------------------------------------------------------------------------------------------


def test_a_pattern_s_parts():
    assert parse("encoder.layer.*") == Pattern("encoder.layer.*", "output")
    assert parse("fc:input") == Pattern("fc", "input")
    assert parse(":hidden_states.*") == Pattern("", "hidden_states.*")
    with pytest.raises(ValueError, match="ends in a colon"):
        parse("fc:")


def test_braces_are_several_patterns():
    assert expand("a.{q,k}.{0,1}", "student") == ("a.q.0", "a.q.1", "a.k.0", "a.k.1")
    assert expand(["b", "a.{k,q}"], "student") == ("b", "a.k", "a.q")
    assert expand("h{,.0}", "student") == ("h", "h.0")
    for wrong in ("a{b", "a}b", "{a,{b}", "{a,b{c,d}}"):
        with pytest.raises(ValueError, match="a brace without its other"):
            expand(wrong, "student")
    with pytest.raises(TypeError, match=r"teacher must name layers by path patterns, .* got int"):
        expand(3, "teacher")
    with pytest.raises(TypeError, match="got NoneType"):
        expand(["a", None], "teacher")
    with pytest.raises(ValueError, match="student names no layer"):
        expand([], "student")


def test_a_star_is_one_part_or_within_one():
    model = Model(depth=11)
    assert matching(model, "layer.*", "student") == [f"layer.{i}" for i in range(11)]  # not 0, 1, 10, 2
    assert matching(model, "layer.*.out*", "student") == [f"layer.{i}.output" for i in range(11)]
    assert matching(model, "*.1.query", "student") == ["layer.1.query"]
    assert matching(model, "", "student") == [""]
    assert matching(nn.Sequential(nn.ReLU()), "0", "student") == ["0"]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layers.*.output", r"near it: layer.\*.output"),  # one suggestion for all of them
        ("layer.output", r"near it: layer.\*.output"),
        ("layer.3.output", r"near it: layer.\d.output, layer.\d.output, layer.\d.output"),
        ("bert.embeddings", "near it: embeddings"),
        ("Query", r"near it: layer.\*.query"),
        ("xyz", "near it: embeddings, layer"),
    ],
)
def test_near_matches(pattern, near):
    with pytest.raises(ValueError, match=f"teacher has no layer {pattern!r}".replace("*", r"\*") + f"; {near}"):
        matching(Model(), pattern, "teacher")


def test_a_model_without_modules_has_no_near_match():
    with pytest.raises(ValueError, match="none, it has no modules"):
        matching(nn.ReLU(), "fc", "student")


# --- What is kept -----------------------------------------------------------------------------------------------------


def test_parts():
    x = torch.randn(5, 2)
    model = Model()
    patterns = {
        "head": "output",
        "head:input": "input",
        "layer.1": "tuple",
        "layer.1:1": "element",
        "layer.1:input": "keyword",
        ":hidden_states.*": "states",
        ":hidden_states.-1": "last",
        ":named.last": "key",
        ":named.*": "values",
        ":logits": "attribute",
        "layer.*:1": "starred",
    }
    found, out = captured(model, *patterns, x=x)
    states = list(out.hidden_states)
    expected = {
        "head": [out.logits],
        "head:input": [states[3]],
        "layer.1": [states[2]],
        "layer.1:1": [states[1]],
        "layer.1:input": [states[1]],
        ":hidden_states.*": states,
        ":hidden_states.-1": [states[3]],
        ":named.last": [states[3]],
        ":named.*": [states[0], states[3]],
        ":logits": [out.logits],
        "layer.*:1": states[:3],
    }
    assert found.keys() == expected.keys()
    for pattern, tensors in expected.items():
        assert len(found[pattern]) == len(tensors), pattern
        assert all(a is b for a, b in zip(found[pattern], tensors, strict=True)), pattern


def test_detached():
    (kept,) = captured(Model(), "layer.1", detach=True)[0]["layer.1"]
    assert not kept.requires_grad
    assert captured(Model(), "layer.1")[0]["layer.1"][0].requires_grad


@pytest.mark.parametrize(
    ("pattern", "error", "said"),
    [
        ("", TypeError, r"student's layer '' \(the model\) is a SimpleNamespace, not a tensor: name the part"),
        (":size", TypeError, "layer ':size' .* is a int, not a tensor"),
        (":hidden_states", TypeError, "is a tuple, not a tensor"),
        (
            ":attentions.*",
            LookupError,
            r"student's layer ':attentions.\*': the output has no 'attentions' .*attentions=True",
        ),
        (":named.middle", LookupError, r"has no 'middle' \(first, last\)"),
        (":logits.*", TypeError, "elements of a tuple or list, not of a Tensor"),
        (":hidden_states.9", LookupError, "layer ':hidden_states.9': tuple index out of range"),
    ],
)
def test_what_is_no_tensor(pattern, error, said):
    with pytest.raises(error, match=said):
        captured(Model(), pattern)


def test_a_shared_module_is_kept_each_time_it_is_called():
    found, out = captured(Model(shared=True), "layer.0")
    assert all(a is b for a, b in zip(found["layer.0"], out.hidden_states[1:], strict=True))
    assert len(found["layer.0"]) == 3


def test_only_the_last_forward_pass_is_kept():
    model = Model()
    capture = Capture(model, ["head"], "student", detach=False)
    model(torch.randn(5, 2))
    last = model(torch.randn(2, 2))
    assert capture.take()["head"][0] is last.logits
    with pytest.raises(RuntimeError, match="'head' was not run since the last loss"):
        capture.take()
    capture.remove()


# --- Checkpointing ----------------------------------------------------------------------------------------------------


def test_what_checkpointing_computes_again_is_not_kept():
    model = Model(reentrant=False)
    patterns = ["layer.*.query", "layer.*"]
    capture = Capture(model, patterns, "student", detach=False)
    first = model(torch.randn(5, 2))
    for tensors in capture.take().values():
        assert len(tensors) == 3
    second = model(torch.randn(5, 2))
    first.logits.sum().backward()  # between the second pass and its loss
    assert all(len(tensors) == 3 for tensors in capture.take().values())
    second.logits.sum().backward()
    with pytest.raises(RuntimeError, match="was not run"):
        capture.take()
    capture.remove()


def test_gradients_through_checkpointing():
    x = torch.randn(5, 2)
    models = [Model(), Model(reentrant=False)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        sum(t.square().sum() for t in captured(model, "layer.*.query", x=x)[0]["layer.*.query"]).backward()
    for a, b in zip(models[0].layer.parameters(), models[1].layer.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_reentrant_checkpointing_would_give_no_gradient():
    with pytest.raises(RuntimeError, match=r"'layer.\*.query' \(layer.0.query\) runs without gradient .*use_reentrant"):
        captured(Model(reentrant=True), "layer.*.query")
    captured(Model(reentrant=True), "layer.*.query", detach=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        captured(Model(reentrant=True), "layer.*.query")


# --- Wrappers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def single_rank(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_do_not_change_paths(single_rank):
    model = Model()
    x = torch.randn(5, 2)
    wrapped = DistributedDataParallel(model)
    assert unwrapped(torch.compile(wrapped, backend="eager")) is model
    found, out = captured(wrapped, "layer.1", x=x)
    torch.testing.assert_close(found["layer.1"][0], model(x).hidden_states[2])
    assert out.logits.shape == (5, 3)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Plain(nn.Module):
    """What dynamo traces in one graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_a_compiled_model_is_seen_where_hooks_come_first(dynamo):
    model = Plain()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    capture = Capture(compiled, ["first", "second:input"], "student", detach=False)
    for rows in (5, 5, 7):
        x = torch.randn(rows, 2)
        compiled(x)
        found = capture.take()
        torch.testing.assert_close(found["first"][0], model.first(x))
        assert len(found["first"]) == len(found["second:input"]) == 1
        capture.clear()  # of the eager calls here
    capture.remove()


def test_a_model_that_was_compiled_before_is_named(dynamo):
    compiled = torch.compile(Plain(), backend="eager")
    compiled(torch.randn(5, 2))
    capture = Capture(compiled, ["first"], "student", detach=False)
    compiled(torch.randn(5, 2))
    with pytest.raises(RuntimeError, match=r"'first' was not run .* enter the Distiller before its first call"):
        capture.take()
    torch._dynamo.reset()
    compiled(torch.randn(5, 2))
    assert len(capture.take()["first"]) == 1
    capture.remove()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile
def test_wrapped_modules_have_their_own_paths(single_rank, dynamo):
    x = torch.randn(5, 2)
    wraps = {
        "checkpoint": checkpoint_wrapper,
        "compile": lambda module: torch.compile(module, backend="eager"),
        "fsdp": lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True),
    }
    for name, wrap in wraps.items():
        model = Model()
        want, _ = captured(model, "layer.*.query", "layer.1:1", x=x)
        model.layer[1] = wrap(model.layer[1])
        model.layer[2].query = wrap(model.layer[2].query)
        model = wrap(model) if name == "fsdp" else model
        assert matching(unwrapped(model), "layer.*.query", "student") == [f"layer.{i}.query" for i in range(3)]
        found, _ = captured(model, "layer.*.query", "layer.1:1", x=x)
        for pattern, tensors in want.items():
            for a, b in zip(found[pattern], tensors, strict=True):
                torch.testing.assert_close(a, b, msg=name)
        if name != "fsdp":  # which begins its backward pass at tensors of the output, and finds none in this one
            sum(t.square().sum() for t in found["layer.*.query"]).backward()


def test_replicas_would_each_see_a_part():
    model = nn.DataParallel(Model())
    model.device_ids = [0, 1]
    for whole in (model, nn.Sequential(model)):
        pattern = "layer.1" if whole is model else "0.module.layer.1"
        with pytest.raises(
            ValueError, match=r"the student is in DataParallel, whose replicas .*DistributedDataParallel"
        ):
            captured(whole, pattern)
    Capture(model, [], "student", detach=False).remove()


# --- What changes afterwards ------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.relu(self.first(x)))


@pytest.mark.parametrize("detach", [False, True])
def test_a_tensor_that_is_changed_in_place_is_refused(detach):
    model = InPlace()
    for pattern in ("first", "relu:input"):
        with pytest.raises(RuntimeError, match=rf"layer '{pattern}' .* changed in place after it ran, as by ReLU"):
            captured(model, pattern, detach=detach)
    found, _ = captured(model, "relu", "second:input", detach=detach)
    assert torch.equal(found["relu"][0], found["second:input"][0])
    with torch.inference_mode():  # which has no versions
        captured(model, "relu", detach=detach)


def test_a_compiled_model_keeps_what_the_layer_returned(dynamo):
    model, x = InPlace(), torch.randn(5, 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, _ = captured(compiled, "first", x=x)
    torch.testing.assert_close(found["first"][0], model.first(x))


# --- Afterwards -------------------------------------------------------------------------------------------------------


def test_copies_are_silent(tmp_path):
    model, x = Model(), torch.randn(5, 2)
    capture = Capture(model, ["layer.1", ":hidden_states.*"], "student", detach=False)
    out = model(x)
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        torch.optim.swa_utils.AveragedModel(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for one in copies:
        one(torch.randn(7, 2))
    found = capture.take()
    assert found["layer.1"][0] is out.hidden_states[2]
    assert len(found[":hidden_states.*"]) == 4
    capture.remove()
    for one in copies:
        torch.testing.assert_close(one(x).logits, out.logits)


def test_who_gives_up_a_distiller_leaves_no_hook():
    student, teacher = Model(), Model()
    loss = Term(lambda step: step.student.layer("layer.1").sum())
    loss.student_layers = loss.teacher_layers = ("layer.1",)
    d = Distiller(student, teacher, [loss])
    d.__enter__()
    assert any(h for model in (student, teacher) for h in hooks(model))
    del d, loss
    gc.collect()
    assert not any(h for model in (student, teacher) for h in hooks(model))


def test_a_compiled_graph_keeps_nothing_afterwards(dynamo):
    compiled = torch.compile(Plain(), backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # torch's default, said here
        capture = Capture(compiled, ["first"], "student", detach=False)
        compiled(torch.randn(5, 2))
        capture.remove()
        compiled(torch.randn(5, 2))
    assert capture._store.kept == {"first": []}


def hooks(model):
    return [dict(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]


def test_nothing_of_a_model_is_left_changed():
    student, teacher = Model(), Model()
    own = student.head.register_forward_hook(lambda module, args, output: None)
    before = [hooks(student), hooks(teacher)]
    state = {name: x.clone() for name, x in student.state_dict().items()}

    def gap(step):
        return (step.student.layer("layer.1") - step.teacher.layer("layer.1")).square().mean()

    loss = Term(gap)
    loss.student_layers = loss.teacher_layers = ("layer.1",)
    with Distiller(student, teacher, [loss]) as d:
        assert [hooks(student), hooks(teacher)] != before
        assert student.state_dict().keys() == state.keys()
        d(torch.randn(5, 2))[0].backward()
    assert [hooks(student), hooks(teacher)] == before
    assert all(torch.equal(x, state[name]) for name, x in student.state_dict().items())
    assert student.state_dict().keys() == state.keys()
    own.remove()


def test_a_pattern_that_names_nothing_leaves_no_hook():
    student, teacher = Model(), Model()
    loss = Term(lambda step: step.student.logits.sum())
    loss.student_layers, loss.teacher_layers = ("layer.1",), ("layer.9",)
    with pytest.raises(ValueError, match=r"teacher has no layer 'layer.9'"), Distiller(student, teacher, [loss]):
        pass
    assert not any(h for model in (student, teacher) for h in hooks(model))


def test_docstring_examples():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
