"""Feature losses: values against loops in fp64, gradients, padding, what is paired with what, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from feature_formulas import CASES, B, S
from machine import DEVICE
from torch import nn

from kdfast import Distiller
from kdfast.methods import Outputs, Step
from kdfast.methods.feature import FSP, NST, VID, AttentionMaps, AttentionTransfer, FitNet, MiniLM, MiniLMv2, TinyBERT

PAGE = Path(__file__).parents[2] / "docs" / "methods-feature.md"
TOKENS = [name for name, case in CASES.items() if case.tokens]


def layers(shapes, dtype=torch.float64, grad=False):
    return {
        name: [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in several]
        for name, several in shapes.items()
    }


def step_of(student, teacher, mask=None):
    return Step(Outputs(None, None, student), (Outputs(None, None, teacher),), mask=mask)


def ragged():
    """(B, S): every example has a token, and one is shorter."""
    lengths = torch.randint(1, S + 1, (B,))
    lengths[0] = S - 1
    return torch.arange(S)[None] < lengths[:, None]


def value_of(loss, step):
    found = loss(step)
    return found[0] if isinstance(found, tuple) else found


def prepared(case, step):
    loss = case.make()
    if not loss.prepared:
        with torch.no_grad():
            loss.prepare(step)
    return loss


def arrays(found):
    return {name: [x.detach().double().cpu().numpy() for x in several] for name, several in found.items()}


def tensors(found):
    return [x for several in found.values() for x in several]


def padded(found, mask, filler):
    """Layers with ``filler`` at padded tokens, of maps at padded queries and keys."""

    def fill(x):
        gone = ~mask
        inside = gone[:, :, None] if x.dim() == 3 else gone[:, None, :, None] | gone[:, None, None, :]
        return torch.where(inside, filler, x.detach()).requires_grad_(x.requires_grad)

    return {name: [fill(x) for x in several] for name, several in found.items()}


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype):
    case = CASES[name]
    student, teacher = layers(case.student, dtype), layers(case.teacher, dtype)
    step = step_of(student, teacher)
    loss = prepared(case, step)
    found = value_of(loss, step)
    assert found.shape == ()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = case.formula(loss, arrays(student), arrays(teacher), None)
    assert found.item() == pytest.approx(
        expected, rel=1e-10 if dtype == torch.float64 else 1e-4, abs=1e-12 if dtype == torch.float64 else 1e-6
    )


@pytest.mark.parametrize("name", TOKENS)
def test_values_with_padding(name):
    case = CASES[name]
    mask = ragged()
    student, teacher = layers(case.student, grad=True), layers(case.teacher)
    loss = prepared(case, step_of(student, teacher, mask))
    expected = case.formula(loss, arrays(student), arrays(teacher), mask.cpu().numpy())
    poisoned = [padded(found, mask, torch.tensor(float("nan"), dtype=torch.float64)) for found in (student, teacher)]
    found = value_of(loss, step_of(*poisoned, mask))
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    found.backward()
    for x in [*tensors(poisoned[0]), *loss.parameters()]:
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", TOKENS)
def test_nothing_but_padding_is_nothing(name):
    case = CASES[name]
    mask = torch.zeros(B, S, dtype=torch.bool)
    student, teacher = layers(case.student, grad=True), layers(case.teacher)
    found = value_of(prepared(case, step_of(student, teacher)), step_of(student, teacher, mask))
    assert found.item() == 0.0
    found.backward()
    assert all(not x.grad.any() for x in tensors(student))


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    case = CASES[name]
    mask = ragged() if case.tokens else None
    student, teacher = layers(case.student, grad=True), layers(case.teacher)
    loss = prepared(case, step_of(student, teacher, mask))
    names = [name for name, several in student.items() for _ in several]

    def function(*inputs):
        found = {name: [x for n, x in zip(names, inputs, strict=False) if n == name] for name in student}
        return value_of(loss, step_of(found, teacher, mask))

    assert torch.autograd.gradcheck(function, (*tensors(student), *loss.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero])
def test_equal_layers(name):
    case = CASES[name]
    student = layers(case.student, torch.float32, grad=True)
    teacher = dict(zip(case.teacher, ([x.detach() for x in several] for several in student.values()), strict=True))
    step = step_of(student, teacher, ragged() if case.tokens else None)
    found = value_of(prepared(case, step), step)
    assert found.item() == 0.0
    found.backward()
    assert all(x.grad.isfinite().all() for x in tensors(student))


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name):
    case = CASES[name]
    student, teacher = layers(case.student, torch.float32), layers(case.teacher, torch.float32)
    step = step_of(student, teacher)
    loss = prepared(case, step)
    plain = value_of(loss, step)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert value_of(loss, step).item() == plain.item()


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_is_nothing(name):
    case = CASES[name]
    student, teacher = layers(case.student, grad=True), layers(case.teacher)
    loss = prepared(case, step_of(student, teacher))
    empty = [{name: [x[:0] for x in several] for name, several in found.items()} for found in (student, teacher)]
    assert value_of(loss, step_of(*empty)).item() == 0.0


def test_nst_is_the_same_by_positions_and_by_channels():
    maps = torch.randn(2, 4, 6, 4, 4, dtype=torch.float64)
    wide = maps.repeat(1, 1, 4, 1, 1)  # every channel four times is the same distribution
    found = [NST("s", "t")(step_of({"s": [m[0]]}, {"t": [m[1]]})).item() for m in (maps, wide)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_dead_channels_and_maps_have_a_gradient():
    for loss in (NST("s", "t"), AttentionTransfer("s", "t"), AttentionTransfer("s", "t", mode="paper")):
        student = torch.zeros(B, 3, 2, 2, requires_grad=True)
        loss(step_of({"s": [student]}, {"t": [torch.zeros(B, 3, 2, 2)]})).backward()
        assert student.grad.isfinite().all()


def test_several_pairs_are_logged():
    step = step_of(layers({"s*": [(B, 2, 3, 3)] * 2}), layers({"t*": [(B, 2, 3, 3)] * 4}))
    total, parts = AttentionTransfer("s*", "t*")(step)
    assert list(parts) == ["0", "1"]
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))


# --- Which layers -----------------------------------------------------------------------------------------------------


def paired(layer_map, students, teachers, student="s.*", teacher="t.*"):
    """The pairs that FitNet makes, told apart by the layers' values."""
    step = step_of(
        {student: [torch.full((1, 1), float(i)) for i in range(students)]},
        {teacher: [torch.full((1, 1), float(i)) for i in range(teachers)]},
    )
    pairs = FitNet(student, teacher, layer_map=layer_map).pairs(step)
    return [(int(pair.student.tensor), int(pair.teacher.tensor)) for pair in pairs]


def test_layer_maps():
    assert paired("uniform", 4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert paired("uniform", 3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert paired("last", 3, 12) == [(0, 9), (1, 10), (2, 11)]
    assert paired([1, -1], 2, 12) == [(0, 1), (1, -1 % 12)]
    assert paired([(0, 1), (0, 3)], 4, 12) == [(0, 1), (0, 3)]
    assert paired("uniform", 1, 12) == [(0, 11)]
    states = (":hidden_states.*", ":encoder_hidden_states.*")
    assert paired("uniform", 3, 9, *states) == [(0, 0), (1, 4), (2, 8)]
    assert paired("last", 3, 9, *states) == [(0, 0), (1, 7), (2, 8)]
    assert paired([0, 8, 7], 3, 9, *states) == [(0, 0), (1, 8), (2, 7)]
    assert paired([2, 5, 8], 3, 9, ":hidden_states.*", "t.*") == [(0, 2), (1, 5), (2, 8)]
    assert paired("uniform", 1, 1, ":hidden_states.-1", ":hidden_states.-1") == [(0, 0)]
    assert paired("uniform", 1, 1, "fc", "head.fc") == [(0, 0)]
    assert paired("uniform", 2, 4, "shared", "shared") == [(0, 1), (1, 3)]  # one module that is called several times


@pytest.mark.parametrize(
    ("layer_map", "students", "teachers", "patterns", "said"),
    [
        ("uniform", 5, 12, ("s.*", "t.*"), r"'s.\*'\[0\] and 't.\*'\[0\]: 5 and 12 layers .* multiple of M"),
        ("uniform", 4, 2, ("s.*", "t.*"), "4 and 2 layers cannot be paired"),
        ("last", 4, 2, ("s.*", "t.*"), "the teacher only 2"),
        ("uniform", 1, 12, ("fc", "t.*"), "one side names a single layer"),
        ("uniform", 3, 1, ("s.*", "fc"), "one side names a single layer"),
        ("uniform", 3, 6, (":hidden_states.*", "t.*"), "begin with the embeddings: name hidden states of both"),
        ("uniform", 3, 8, (":hidden_states.*", ":hidden_states.*"), "2 and 7 layers cannot be paired"),
        ([0, 1], 3, 3, ("s.*", "t.*"), "2 positions for 3 layers"),
        ([0, 3], 2, 3, ("s.*", "t.*"), r"the pair \(1, 3\), and there are 2 and 3 layers"),
        ([(2, 0)], 2, 3, ("s.*", "t.*"), r"the pair \(2, 0\)"),
    ],
)
def test_layers_that_no_map_pairs(layer_map, students, teachers, patterns, said):
    with pytest.raises(ValueError, match=said):
        paired(layer_map, students, teachers, *patterns)


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ((3, 4), (2, 4), r"student 's' is \(3, 4\), teacher 't' is \(2, 4\): they differ in the batch"),
        ((3, 5, 4), (3, 6, 4), r"student 's' is \(3, 5, 4\), teacher 't' is \(3, 6, 4\): they differ in the sequence"),
        ((3, 5, 4), (3, 5, 2, 2), r"\(3, 5, 4\), teacher 't' is \(3, 5, 2, 2\): layers of one kind"),
        ((3, 2, 2, 2, 2), (3, 2, 2, 2, 2), "a projector is made for"),
    ],
)
def test_layers_of_other_sizes(student, teacher, said):
    step = step_of(layers({"s": [student]}), layers({"t": [teacher]}))
    for loss in (FitNet("s", "t"), VID("s", "t")):
        with pytest.raises(ValueError, match=said):
            loss.prepare(step)


def test_layers_of_another_kind():
    tokens = {"s": [torch.randn(B, S, 4)], "s2": [torch.randn(B, S, 4)]}
    for loss in (AttentionTransfer("s", "s"), NST("s", "s"), FSP("{s,s2}", "{s,s2}")):
        with pytest.raises(ValueError, match=r"needs feature maps \(B, C, H, W\), and student 's' is \(3, 5, 4\)"):
            loss(step_of(tokens, tokens))
    for loss in (MiniLM("{s,s2,s2}", "{s,s2,s2}", heads=3), MiniLMv2("{s,s2,s2}", "{s,s2,s2}")):
        with pytest.raises(ValueError, match=r"H divisible by (3|48) heads"):
            loss(step_of(tokens, tokens))
    with pytest.raises(ValueError, match=r"'s' is \(3, 5, 4\), .* \(B, S, 3 H\)"):
        MiniLM("s", "s", heads=2)(step_of(tokens, tokens))
    with pytest.raises(ValueError, match="heads is needed to split student 's'"):
        AttentionMaps("s", "s")(step_of(tokens, tokens))
    with pytest.raises(ValueError, match="embeddings' output and that of at least one layer"):
        TinyBERT("s", "s", student_attention=None, teacher_attention=None).prepare(step_of(tokens, tokens))


def test_attention_of_other_sizes():
    maps = step_of(layers({"s": [(B, 2, S, S)]}), layers({"s": [(B, 4, S, S)]}))
    with pytest.raises(ValueError, match="must agree, head by head"):
        AttentionMaps("s", "s")(maps)
    with pytest.raises(ValueError, match=r"attention maps \(B, heads, S, S\) are needed"):
        AttentionMaps("s", "s")(step_of(*[layers({"s": [(B, 2, S, 3)]})] * 2))
    grouped = {"q": [torch.randn(B, S, 8)], "k": [torch.randn(B, S, 4)], "v": [torch.randn(B, S, 4)]}
    with pytest.raises(ValueError, match=r"student 'q' is \(3, 5, 8\), 'k' is \(3, 5, 4\): queries and keys"):
        MiniLM("{q,k,v}", "{q,k,v}", heads=2)(step_of(grouped, grouped))
    assert MiniLMv2("{q,k,v}", "{q,k,v}", relation_heads=2)(step_of(grouped, grouped))[0] == 0
    unlike = {"q.*": [torch.randn(B, S, 4)] * 2, "k.*": [torch.randn(B, S, 4)]}
    with pytest.raises(ValueError, match=r"unlike numbers of layers: 'q.\*' 2, 'k.\*' 1"):
        AttentionMaps("{q.*,k.*}", "{q.*,k.*}", heads=2)(step_of(unlike, unlike))
    several = {f"{x}.*": [torch.randn(B, S, 4)] * 2 for x in "qkv"}
    with pytest.raises(ValueError, match=r"'q.\*' is 2 layers, one is compared"):
        MiniLM("{q.*,k.*,v.*}", "{q.*,k.*,v.*}", heads=2)(step_of(several, several))


def test_a_mask_of_other_tokens():
    step = step_of(layers({"s": [(B, S, 4)]}), layers({"s": [(B, S, 4)]}), torch.ones(B, S + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the mask is \(3, 6\), and layer 's' is \(3, 5, 4\)"):
        prepared(CASES["fitnet-tokens"]._replace(make=lambda: FitNet("s", "s")), step)(step)
    with pytest.raises(ValueError, match=r"the mask is \(3, 6\)"):
        AttentionMaps("{s,s}", "{s,s}", heads=2)(step)


def test_widths_that_changed_since_prepare():
    loss = FitNet("s", "t")
    loss.prepare(step_of(layers({"s": [(B, 4)]}), layers({"t": [(B, 6)]})))
    with pytest.raises(ValueError, match="not as wide as the one that prepare saw"):
        loss(step_of(layers({"s": [(B, 4)]}), layers({"t": [(B, 1)]})))


def test_fsp_needs_two_layers_of_as_many_channels():
    def maps(**channels):
        return layers({name: [(B, c, 3, 3)] for name, c in channels.items()})

    with pytest.raises(ValueError, match=r"student matrix of 's1' and 's2' is \(3, 2, 3\), teacher .* is \(3, 2, 4\)"):
        FSP("{s1,s2}", "{t1,t2}")(step_of(maps(s1=2, s2=3), maps(t1=2, t2=4)))
    with pytest.raises(ValueError, match="FSP needs two student layers, and there are 3"):
        FSP("s*", "{t1,t2}")(step_of(layers({"s*": [(B, 2, 3, 3)] * 3}), maps(t1=2, t2=2)))
    with pytest.raises(ValueError, match="they differ in the batch"):
        FSP("{s,s}", "{t,t}")(step_of(maps(s=2), {"t": [torch.randn(B + 1, 2, 3, 3)]}))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: FitNet(3, "t"), TypeError, "student must name layers by path patterns"),
        (lambda: FitNet("s", ["t", 3]), TypeError, "teacher must name layers .* got int"),
        (lambda: FitNet("s", []), ValueError, "teacher names no layer"),
        (lambda: FitNet("s.{a,b", "t"), ValueError, "a brace without its other"),
        (lambda: FitNet("s", "t", layer_map="even"), ValueError, 'layer_map must be "uniform", "last" or a list'),
        (lambda: FitNet("s", "t", layer_map=[0.5]), TypeError, "layer_map must be a list of positions"),
        (lambda: FitNet("s", "t", layer_map=[]), ValueError, "layer_map is empty"),
        (lambda: AttentionTransfer("s", "t", mode="sum"), ValueError, 'mode must be "code" or "paper"'),
        (lambda: VID("s", "t", variance=1e-6), ValueError, "variance must be above eps"),
        (lambda: FSP("s", "t"), ValueError, "student must name two layers"),
        (lambda: FSP("{a,b}", "{a,b,c}"), ValueError, "teacher must name two layers"),
        (lambda: AttentionMaps("{a,b,c}", "t"), ValueError, "student must be one pattern of maps, or two"),
        (lambda: AttentionMaps("{a,b}", "t"), ValueError, "heads is needed"),
        (lambda: AttentionMaps("{a,b}", "t", heads=0), ValueError, "heads must be at least 1, got 0"),
        (lambda: TinyBERT(student_attention="a", teacher_attention=None), ValueError, "go together"),
        (lambda: MiniLM("{a,b}", "t", heads=2), ValueError, "student must name the query, key and value projections"),
        (lambda: MiniLMv2("s", "t", relation_heads=-1), ValueError, "relation_heads must be at least 1, got -1"),
    ],
)
def test_wrong_arguments(make, error, said):
    with pytest.raises(error, match=said):
        make()


# --- Through a Distiller ----------------------------------------------------------------------------------------------


def cnn(width, classes=5):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()),
        nn.Flatten(),
        nn.LazyLinear(classes),
    )


def pair_of_cnns(name=""):
    """Student and teacher, of one width where the loss needs it, and a batch that has run through both."""
    student, teacher = cnn(6 if name == "fsp" else 4), cnn(6)
    batch = (torch.randn(6, 3, 6, 6), torch.randint(0, 5, (6,)))
    with torch.no_grad():
        student(batch[0]), teacher(batch[0])
    return student, teacher, batch


CNN_LOSSES = {
    "fitnet": lambda: FitNet("1", "1"),
    "attention_transfer": lambda: AttentionTransfer("{0,1}", "{0,1}"),
    "nst": lambda: NST("1", "1"),
    "vid": lambda: VID("3:input", "3:input"),
    "fsp": lambda: FSP(("0", "1"), ("0", "1")),
}


@pytest.mark.parametrize("name", CNN_LOSSES)
def test_training_lowers_the_loss_and_leaves_the_teacher(name):
    student, teacher, batch = pair_of_cnns(name)
    before = [p.clone() for p in teacher.parameters()]
    with Distiller(student, teacher, [CNN_LOSSES[name]()]) as d:
        if not all(loss.prepared for loss in d.losses.values()):
            d.prepare(batch)
        optimizer = torch.optim.Adam([*student[:2].parameters(), *d.parameters()], lr=3e-3)
        values = []
        for _ in range(25):
            loss, terms = d(batch)
            assert name in terms
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    assert min(values[-5:]) < values[0]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, teacher.parameters(), strict=True))
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


@pytest.mark.parametrize("name", CNN_LOSSES)
def test_micro_batches_add_up(name):
    student, teacher, (x, labels) = pair_of_cnns(name)
    with Distiller(student.double(), teacher.double(), [CNN_LOSSES[name]()]) as d:
        x = x.double()
        d.prepare((x, labels))
        parameters = [*student[:2].parameters(), *d.parameters()]
        whole = torch.autograd.grad(d((x, labels))[0], parameters)
        parts = [d((x[i], labels[i]), num_items=6)[0] for i in (slice(0, 4), slice(4, 6))]
        for a, b in zip(whole, torch.autograd.grad(sum(parts), parameters), strict=True):
            torch.testing.assert_close(a, b)


def test_labels_that_are_dropped_leave_the_features_in():
    student, teacher, (x, labels) = pair_of_cnns()
    with Distiller(student, teacher, [NST("1", "1")]) as d:
        assert d((x, labels))[0] == d((x, torch.full_like(labels, -100)))[0] == d((x, None))[0]


def test_state_comes_back():
    student, teacher, batch = pair_of_cnns()
    with Distiller(student, teacher, [FitNet("1", "1"), VID("1", "1")]) as d:
        d.prepare(batch)
        state, value = d.state_dict(), d(batch)[0]
    with Distiller(student, teacher, [FitNet("1", "1"), VID("1", "1")]) as d:
        d.prepare(batch)
        assert d(batch)[0] != value
        d.load_state_dict(state)
        assert d(batch)[0] == value


# --- Documentation ----------------------------------------------------------------------------------------------------


def test_page():
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    exec(example, scope := {})
    assert scope["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in scope["student"].parameters())
