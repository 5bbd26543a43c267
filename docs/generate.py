"""Writes docs/methods from the docstrings: `python docs/generate.py`, or `make docs`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kdfast
from kdfast import methods

FOLDER = Path(__file__).parent / "methods"
SECTIONS = ("When to use", "Cost", "Args", "Returns", "Raises", "Source", "Example")
TITLES = {"Args": "Arguments", "Raises": "Errors"}
NOTE = "<!-- Written by `make docs` from the docstrings of {}; do not edit. -->"


@dataclass(frozen=True)
class Page:
    """One method: its classes, the first of which names the page, and its plain functions."""

    file: str
    title: str
    classes: tuple[Any, ...]
    functions: tuple[Callable[..., Any], ...] = ()


GROUPS = {
    "Of the logits": (
        Page("kd", "Knowledge distillation", (methods.KD,), (kdfast.distill_loss,)),
        Page("cross-entropy", "Cross-entropy", (methods.CrossEntropy,)),
        Page("dkd", "Decoupled distillation (DKD)", (methods.DKD,), (methods.dkd_loss,)),
        Page("nkd", "Normalised distillation (NKD)", (methods.NKD,), (methods.nkd_loss,)),
        Page("dist", "Distillation by correlation (DIST)", (methods.DIST,), (methods.dist_loss,)),
        Page(
            "logit-standardisation",
            "Logit standardisation",
            (methods.LogitStandardisation,),
            (methods.standardised_loss,),
        ),
        Page("ttm", "Transformed teacher matching (TTM, WTTM)", (methods.TTM, methods.WTTM), (methods.ttm_loss,)),
        Page("adaptive-kl", "Adaptive KL", (methods.AdaptiveKL,), (methods.adaptive_kl_loss,)),
        Page("learned-temperature", "Curriculum temperature (CTKD)", (methods.LearnedTemperature,)),
    ),
    "Of layers": (
        Page("fitnet", "Hints (FitNet)", (methods.FitNet,)),
        Page("attention-transfer", "Attention transfer (AT)", (methods.AttentionTransfer,)),
        Page("nst", "Neuron selectivity transfer (NST)", (methods.NST,)),
        Page("vid", "Variational information distillation (VID)", (methods.VID,)),
        Page("fsp", "Flow of solution procedure (FSP)", (methods.FSP,)),
        Page("tinybert", "TinyBERT", (methods.TinyBERT,)),
        Page("attention-maps", "Attention maps", (methods.AttentionMaps,)),
        Page("minilm", "MiniLM", (methods.MiniLM,)),
        Page("minilmv2", "MiniLMv2", (methods.MiniLMv2,)),
    ),
    "Of relations between samples": (
        Page("rkd", "Relational distillation (RKD)", (methods.RKD,)),
        Page("sp", "Similarity preservation (SP)", (methods.SP,)),
        Page("cc", "Correlation congruence (CC)", (methods.CC,)),
        Page("pkt", "Probabilistic knowledge transfer (PKT)", (methods.PKT,)),
        Page("crd", "Contrastive representation distillation (CRD)", (methods.CRD,)),
    ),
}
PAGES = [page for group in GROUPS.values() for page in group]
HOMES = {thing.__name__: page.file for page in PAGES for thing in (*page.classes, *page.functions)}
HOMES["layers"] = "../methods-feature"


def sections(thing: Any) -> dict[str, str]:
    """The parts of a docstring; what stands before the first heading is ``""``."""
    found = {"": ""}
    heading = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        name = line.removesuffix(":")
        if name in SECTIONS and line.endswith(":"):
            heading = name
            found[heading] = ""
        else:
            found[heading] += line + "\n"
    return {name: textwrap.dedent(text).strip("\n") for name, text in found.items()}


def markdown(text: str, here: str) -> str:
    """Prose of a docstring: what it names becomes a link where it has a page."""

    def link(match: re.Match[str]) -> str:
        name = match[1].removeprefix("~").rpartition(".")[2]
        home = HOMES.get(name)
        return f"`{name}`" if home in (None, here) else f"[`{name}`]({home}.md)"

    text = re.sub(r":(?:class|func|meth|mod):`([^`]+)`", link, text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    blocks = []
    for block in re.split(r"\n\n+", text):
        if all(line.startswith("    ") for line in block.splitlines()) or block.startswith("==="):
            blocks.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            blocks.append(block)
    text = "\n\n".join(blocks)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def entries(text: str, here: str) -> str:
    """Arguments or errors as a list; further lines of an entry are indented in the docstring."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") or not found:
            found[-1:] = [f"{found[-1]} {line.strip()}"] if found else [line]
        else:
            found.append(line)
    rows = []
    for entry in found:
        name, colon, rest = entry.partition(": ")
        rows.append(f"- `{name}`: {markdown(rest, here)}" if colon else f"- {markdown(entry, here)}")
    return "\n".join(rows)


def code(text: str) -> str:
    """A doctest as the lines to type, what they print in comments."""
    lines = []
    for line in text.splitlines():
        if line.startswith((">>> ", "... ")) or line in (">>>", "..."):
            lines.append(line[4:])
        else:
            lines.append(f"# {line}")
    imports, rest = {"import torch"} if "torch." in text else set(), []
    used: dict[str, set[str]] = {}
    for line in lines:
        if match := re.fullmatch(r"from (kdfast[\w.]*) import (.*)", line):
            used.setdefault(match[1], set()).update(match[2].split(", "))
        elif line.startswith(("import ", "from ")):
            imports.add(line)
        else:
            rest.append(line)
            for name in re.findall(r"(?<![\w.])\w+", line.partition("#")[0]):
                if name in methods.__all__:
                    used.setdefault("kdfast.methods", set()).add(name)
                elif name in HOMES and name in kdfast.__all__:
                    used.setdefault("kdfast", set()).add(name)
    ours = [f"from {module} import {', '.join(sorted(used[module]))}" for module in sorted(used)]
    # A total order: a set's own changes from one process to the next.
    others = sorted(imports, key=lambda line: (line.split()[1], line.startswith("from ")))
    head = "\n\n".join("\n".join(part) for part in (others, ours) if part)
    return f"```python\n{head}\n\n" + "\n".join(rest) + "\n```"


def body(thing: Any, here: str, *, of_function: bool = False) -> list[str]:
    """The sections of one class or function below its heading."""
    found = sections(thing)
    text = [markdown(found.pop(""), here)]
    for name in SECTIONS:
        if name not in found:
            continue
        content = found[name]
        if of_function and name == "Source":
            continue  # the class has it
        text.append(f"### {TITLES.get(name, name)}")
        if name in ("Args", "Raises"):
            text.append(entries(content, here))
        elif name == "Example":
            text.append(code(content))
        else:
            text.append(markdown(content, here))
    return text


def signature(thing: Any) -> str:
    """The call, each argument with its default on a line."""
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name != "self"]
    lines, starred = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        name = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        default = "" if p.default is p.empty else f"={p.default!r}"
        lines.append(f"    {name}{default},")
    return f"```python\n{thing.__name__}(\n" + "\n".join(lines) + "\n)\n```"


def render(page: Page) -> str:
    """One page."""
    where = {thing.__module__ for thing in (*page.classes, *page.functions)}
    text = [NOTE.format(", ".join(sorted(where))), f"# {page.title}"]
    for thing in page.classes:
        text += [f"## `{thing.__name__}`", signature(thing), *body(thing, page.file)]
    for function in page.functions:
        text += [f"## As a function: `{function.__name__}`", signature(function)]
        text += body(function, page.file, of_function=True)
    text.append("[All methods](README.md) · [which one?](../choosing.md) · [measured](../methods-results.md)")
    return "\n\n".join(part for part in text if part) + "\n"


def index() -> str:
    """The list of all pages."""
    text = [
        NOTE.format("kdfast.methods"),
        "# Methods",
        "Each is a loss for [`Distiller`](../distiller.md). [Which one?](../choosing.md) · "
        "[measured side by side](../methods-results.md)",
    ]
    for title, pages in GROUPS.items():
        rows = ["| | paper | |", "|---|---|---|"]
        for page in pages:
            first = sections(page.classes[0])
            says = first[""] if ":func:" not in first[""].split("\n\n")[0] else sections(page.functions[0])[""]
            summary = markdown(says.split("\n\n")[0].replace("\n", " "), "README").replace("|", "\\|")
            paper = re.search(r"arXiv (\d{4}\.\d{4,5})", first.get("Source", ""))
            cell = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""
            names = ", ".join(f"`{one.__name__}`" for one in page.classes)
            rows.append(f"| [{page.title}]({page.file}.md)<br>{names} | {cell} | {summary} |")
        text += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(text) + "\n"


def pages() -> dict[str, str]:
    """Every file of docs/methods, by its name."""
    return {"README.md": index()} | {f"{page.file}.md": render(page) for page in PAGES}


def main() -> None:
    """Writes them, and removes what is no longer one of them."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
