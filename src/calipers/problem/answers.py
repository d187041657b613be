"""How is a model measured that can only be called? A Python function from arrays to arrays, dressed
as a module without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from calipers.errors import BadInput, BadModel

Kind = Literal["scores", "probabilities", "labels"]


class Answers(nn.Module):
    """A function of numpy arrays (N, *D) as a module that returns scores (N, K), with no gradient:
    for attacks that only ask.

    `kind` says what the function returns: "scores" (N, K) of any scale (or (N,): one decision score
    of two classes), "probabilities" (N, K), which become log-probabilities, or "labels" (N,) from 0
    to `classes` - 1, which become +1 at the label and -1 elsewhere. `flat` hands over rows (N, d).
    `name` stands for the function in the record's identity of the model: a function's weights
    cannot be seen, so change the name when they change. `no_graph` says why there are no bounds,
    where something better than "a function" can be said.

    >>> import numpy as np
    >>> Answers(lambda x: np.stack([x.sum(1), 0 * x.sum(1)], 1))(torch.ones(1, 2)).tolist()
    [[2.0, 0.0]]
    """

    anchor: Tensor

    def __init__(
        self,
        function: Callable[[Any], Any],
        kind: Kind = "scores",
        *,
        classes: int | None = None,
        flat: bool = False,
        name: str = "function",
        dtype: torch.dtype = torch.float32,
        no_graph: str = "",
    ) -> None:
        super().__init__()
        self.no_graph = no_graph
        if not callable(function):
            raise BadInput(f"Answers wraps a function of arrays, got {type(function).__name__}")
        if kind not in ("scores", "probabilities", "labels"):
            raise BadInput(f"kind is 'scores', 'probabilities' or 'labels', got {kind!r}")
        if kind == "labels" and (classes is None or classes < 2):
            raise BadInput(
                "labels alone do not say how many classes there are: give classes=K, at least 2, "
                f"got {classes}"
            )
        self.function, self.kind, self.classes, self.flat, self.name = (
            function,
            kind,
            classes,
            flat,
            name,
        )
        # what the classes are called, in the order of the outputs, where they are not called 0, 1,
        # 2, ...
        self.labels: Any = None
        self.register_buffer("anchor", torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(N, *D) -> (N, K)."""
        rows = x.detach().cpu().flatten(1) if self.flat else x.detach().cpu()
        # A copy: the function may keep or change what it is given.
        found = np.asarray(self.function(np.array(rows.numpy())))
        if found.ndim not in (1, 2) or len(found) != len(x):
            raise BadModel(
                f"the function must return one row a point; for {len(x)} points it returned an "
                f"array of shape {found.shape}"
            )
        if self.kind == "labels":
            return self._signs(found).to(x)
        answer = torch.as_tensor(np.array(found, dtype=np.float64))
        if self.kind == "probabilities":
            if answer.dim() == 1 or answer.shape[1] == 1:
                one = answer.reshape(-1, 1)
                answer = torch.cat([1 - one, one], 1)
            answer = torch.where(
                answer.isnan(), answer, answer.clamp(torch.finfo(torch.float32).tiny, 1.0)
            ).log()
        return answer.to(x)

    def _signs(self, labels: np.ndarray[Any, Any]) -> Tensor:
        place = torch.as_tensor(labels.reshape(-1).astype(np.int64))
        classes = self.classes or 0
        if bool(((place < 0) | (place >= classes)).any()):
            raise BadModel(
                f"labels must lie in 0..{classes - 1}, got {int(place.min())}..{int(place.max())}"
            )
        return 2.0 * nn.functional.one_hot(place, classes) - 1.0

    def extra_repr(self) -> str:
        """Return what tells this model from another one."""
        return f"{self.name}, kind={self.kind}, classes={self.classes}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Answers:
        """Share the function: sessions and estimators need not be copyable, and nothing here writes
        to them.
        """
        made = Answers(
            self.function,
            self.kind,
            classes=self.classes,
            flat=self.flat,
            name=self.name,
            dtype=self.anchor.dtype,
            no_graph=self.no_graph,
        )
        made.labels = self.labels
        return made
