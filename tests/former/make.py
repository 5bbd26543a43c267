"""Writes what users keep: pickles and an exported program. The files beside it are of the first layout of the package.

Run it with the version whose files are wanted; a later version must go on reading them.
"""

import pickle
from pathlib import Path

import torch

import kdfast

HERE = Path(__file__).parent


class Step(torch.nn.Module):
    def forward(self, student, teacher, labels):
        return kdfast.distill_loss(student, teacher, labels, temperature=2.0)


def objects():
    ids = torch.tensor([[1, 3]], dtype=torch.int32)
    logprobs = torch.log(torch.tensor([[0.5, 0.25]]))
    data, offset = torch.zeros(8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    return {
        "sparse": kdfast.SparseTargets(ids, logprobs, vocab_size=5, lse={2.0: torch.zeros(1)}),
        "head": kdfast.LMHead(torch.ones(1, 2), torch.ones(5, 2), softcap=3.0),
        "divergence": kdfast.Divergence("jsd", beta=0.25),
        "terms": kdfast.distill_loss(torch.zeros(1, 5), torch.ones(1, 5), return_terms=True),
        "loss": kdfast.DistillLoss(temperature=2.0),
        "packed": kdfast.PackedTargets(data, offset, torch.zeros(1), kept=2, vocab_size=5, grid=4),
        "error": kdfast.CacheError("what", "corrupt", "/a", "k", 3),
    }


if __name__ == "__main__":
    (HERE / "objects.pkl").write_bytes(pickle.dumps(objects(), protocol=2))
    sizes = torch.zeros(3, 7), torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64)
    torch.export.save(torch.export.export(Step(), sizes), HERE / "program.pt2")
