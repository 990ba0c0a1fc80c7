"""A linear layer with low-rank adapters beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from taskloom.nn.base_layers import check_base_layer
from taskloom.nn.lowrank_parts import BASE, Magnitude, Settings, Tasks
from taskloom.ops import dora_merge, lowrank_apply, lowrank_merge, lowrank_merge_, lowrank_norm, lowrank_unmerge_
from taskloom.reference.arithmetic import accumulation_dtype


class LowRankLinear(nn.Module):
    """A frozen linear layer with named low-rank adapters: LoRA, rank-stabilised LoRA, DoRA.

    Its parameters have PEFT's names: ``base_layer.weight``, ``lora_A.NAME.weight`` ``[r, in]``, ``lora_B.NAME.weight`` ``[out, r]``,
    ``lora_magnitude_vector.NAME.weight`` ``[out]``.

    Parameters
    ----------
    base_layer
        The layer; its parameters stop requiring grad, and it is changed by :meth:`merge` only.

    Attributes
    ----------
    active_adapters
        The adapters whose sum a forward pass adds; set by :meth:`set_adapter`.
    merged_adapters
        Those that the base's weight holds at present.

    Raises
    ------
    TypeError
        If ``base_layer`` is no ``nn.Linear``, or one that is quantised, parametrised or has a forward pass of its own.

    Notes
    -----
    Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353; the interface is that of PEFT's layer. Computed by
    :func:`taskloom.lowrank_apply` and :func:`taskloom.lowrank_merge_`.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        check_base_layer("base_layer", base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_dropout, self.lora_magnitude_vector = nn.ModuleDict(), nn.ModuleDict()
        self.settings: dict[str, Settings] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.tasks: Tasks | None = None
        self._kept_base: Tensor | None
        self.register_buffer("_kept_base", None, persistent=False)

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base's weight, with what is merged into it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters, in the order of their numbers."""
        return list(self.settings)

    def add_adapter(
        self, name: str, r: int, alpha: float | None = None, *, dropout: float = 0.0, use_rslora: bool = False, use_dora: bool = False
    ) -> None:
        """Add an adapter that changes nothing yet, and make it the active one if it is the first.

        Parameters
        ----------
        name
            Its name, without dots.
        r
            Rank, at least 1.
        alpha
            The product is scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``. Default: r.
        dropout
            Probability that an entry of its input is dropped in training. Default 0.
        use_rslora, use_dora
            Default False.

        Raises
        ------
        TypeError
            If the rank is no integer.
        ValueError
            If the name is taken or cannot be one, the rank is below 1, alpha is not finite, or the dropout is outside [0, 1).
        RuntimeError
            If an adapter is merged, whose norms DoRA would start from.

        Notes
        -----
        A starts from He's uniform distribution and B from zeros, as in PEFT. The factors are float32 where the base is a 16-bit type, else
        of the base's dtype.
        """
        self.check_new(name)
        if isinstance(r, bool) or not isinstance(r, int):
            raise TypeError(f"r: expected an integer, got {type(r).__name__}")
        if r < 1:
            raise ValueError(f"r: expected a rank of at least 1, got {r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
        if alpha is not None and not math.isfinite(alpha):
            raise ValueError(f"alpha: expected a finite number, got {alpha}")
        weight = self.base_layer.weight
        like = {"device": weight.device, "dtype": accumulation_dtype(weight)}
        settings = Settings(r, float(r if alpha is None else alpha), use_rslora, use_dora)
        A, B = nn.Linear(self.in_features, r, bias=False, **like), nn.Linear(r, self.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        nn.init.zeros_(B.weight)
        self.lora_A[name], self.lora_B[name] = A, B
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        if use_dora:
            with torch.no_grad():
                self.lora_magnitude_vector[name] = Magnitude(lowrank_norm(weight, A.weight, B.weight, settings.scaling))
        self.settings[name] = settings
        if not self.active_adapters:
            self.active_adapters = [name]

    def check_new(self, name: str) -> None:
        """Raise where no adapter of that name can be added: ValueError for the name, RuntimeError where others are merged."""
        # Containers of modules refuse the names of their own attributes.
        if name in self.settings or name == BASE or not name or "." in name or hasattr(self.lora_A, name):
            taken = "is taken" if name in self.settings else "cannot be an adapter's name"
            raise ValueError(f"name: {name!r} {taken}")
        if self.merged_adapters:
            raise RuntimeError(f"add_adapter: {', '.join(self.merged_adapters)} are merged; unmerge first")

    def delete_adapter(self, name: str) -> None:
        """Take an adapter out.

        Raises
        ------
        ValueError
            If there is none of that name.
        RuntimeError
            If it is merged.
        """
        self._check(name)
        if name in self.merged_adapters:
            raise RuntimeError(f"delete_adapter: {name!r} is merged; unmerge first")
        for parts in (self.lora_A, self.lora_B, self.lora_dropout, self.lora_magnitude_vector):
            if name in parts:
                del parts[name]
        del self.settings[name]
        self.active_adapters = [one for one in self.active_adapters if one != name]

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make one or several adapters the active ones; they require grad, the others do not, as in PEFT.

        Raises
        ------
        ValueError
            If there is no adapter of a name, or one is named twice.
        """
        chosen = self._chosen(names)
        self.active_adapters = chosen
        for name in self.settings:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(name in chosen)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A ``[r, in]`` and B ``[out, r]`` of an adapter."""
        self._check(name)
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(A, Tensor)
        assert isinstance(B, Tensor)
        return A, B

    def magnitude(self, name: str) -> Tensor | None:
        """DoRA's norms ``[out]`` of an adapter; None where it is not DoRA's."""
        if name not in self.lora_magnitude_vector:
            return None
        found = self.lora_magnitude_vector[name].weight
        assert isinstance(found, Tensor)
        return found

    def delta_weight(self, name: str | None = None) -> Tensor:
        """What an adapter (default: the one that is active) adds to the weight: ``[out, in]`` in the dtype of the weight.

        Raises
        ------
        ValueError
            If there is no adapter of that name, or not one adapter is active.
        RuntimeError
            If it is DoRA's while adapters are merged: what it adds depends on the weight.
        """
        if name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(f"name: expected one, as {len(self.active_adapters)} adapters are active")
            (name,) = self.active_adapters
        A, B = self.factors(name)
        scaling, magnitude = self.settings[name].scaling, self.magnitude(name)
        weight = self.base_layer.weight
        if magnitude is None:
            return lowrank_merge(torch.zeros_like(weight), A, B, scaling)
        if self.merged_adapters:
            raise RuntimeError(f"delta_weight: {', '.join(self.merged_adapters)} are merged; unmerge first")
        return dora_merge(weight, A, B, magnitude, scaling) - weight

    def forward(self, x: Tensor, tasks: Tasks | None = None) -> Tensor:
        """The base's output and what the adapters add to it.

        Parameters
        ----------
        x
            ``[..., in]``.
        tasks
            The adapter of each sample along x's first dimension: a list of names (``"__base__"`` for none), or integers, numbers in
            :attr:`adapters` (negative for none), whose shape is a first part of x's. Default None: what :func:`use_tasks` says, else the
            sum of :attr:`active_adapters`.

        Returns
        -------
        Tensor
            ``[..., out]`` in x's dtype.

        Raises
        ------
        ValueError
            If there is no adapter of a name, or a number is too large; if adapters of mixed batches are DoRA's or differ in dropout while
            in training.
        RuntimeError
            If ``tasks`` are given while adapters are merged.
        """
        weight, bias = self.base_layer.weight, self.base_layer.bias
        tasks = self.tasks if tasks is None else tasks
        if tasks is not None:
            return self._mixed(x, tasks)
        if self.merged_adapters or not self.active_adapters:
            return nn.functional.linear(x, weight, bias)
        plain = [name for name in self.active_adapters if name not in self.lora_magnitude_vector and not self._drops(name)]
        others = [name for name in self.active_adapters if name not in plain]
        y = self._applied(x, plain, weight, bias) if plain else nn.functional.linear(x, weight, bias)
        for name in others:
            y = y + (self._dora_part(x, name) if name in self.lora_magnitude_vector else self._applied(self._dropped(x, name), [name]))
        return y

    def merge(self, safe: bool = False, adapters: str | Sequence[str] | None = None, *, keep_base: bool = True) -> None:
        """Merge adapters into the base's weight, in one pass over it.

        Parameters
        ----------
        safe
            Make the result aside and keep it only if it is finite. Default False.
        adapters
            Default: the active ones.
        keep_base
            Keep a copy of the weight, so that :meth:`unmerge` restores its bits. Default True; without, unmerging subtracts, which restores
            the weight up to the rounding of the merge, and DoRA's adapters cannot be unmerged.

        Raises
        ------
        ValueError
            If there is no adapter of a name, one is named twice, or the result is not finite and ``safe`` was asked for. The weight is as
            it was then.
        RuntimeError
            If adapters are merged already.
        """
        names = self._chosen(self.active_adapters if adapters is None else adapters)
        if self.merged_adapters:
            raise RuntimeError(f"merge: {', '.join(self.merged_adapters)} are merged already; unmerge first")
        if not names:
            return
        weight = self.base_layer.weight
        kept = weight.detach().clone() if keep_base else None
        with torch.no_grad():
            if safe:
                merged = self._merged(weight.detach(), names)
                if not bool(merged.isfinite().all()):
                    raise ValueError(f"merge: {', '.join(names)} give a weight that is not finite; nothing was merged")
                weight.copy_(merged)
            else:
                self._merge_into(weight.detach(), names)
        self._kept_base = kept
        self.merged_adapters = list(names)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base's weight again: its old bits where they were kept, else by subtraction.

        Raises
        ------
        RuntimeError
            If DoRA's adapters were merged without keeping the weight.
        """
        if not self.merged_adapters:
            return
        names = self.merged_adapters
        weight = self.base_layer.weight
        with torch.no_grad():
            if self._kept_base is None and any(name in self.lora_magnitude_vector for name in names):
                raise RuntimeError("unmerge: DoRA's adapters cannot be subtracted; merge with keep_base=True")
            A, B, scales = self._listed(names)
            lowrank_unmerge_(weight.detach(), A, B, scale=scales, base=self._kept_base)
        self._kept_base = None
        self.merged_adapters = []

    def adapter_state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """The adapter's tensors (default: of the one that is active) under PEFT's names in a file: ``lora_A.weight`` and so on."""
        if name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(f"name: expected one, as {len(self.active_adapters)} adapters are active")
            (name,) = self.active_adapters
        A, B = self.factors(name)
        magnitude = self.magnitude(name)
        state = {"lora_A.weight": A, "lora_B.weight": B} | ({} if magnitude is None else {"lora_magnitude_vector": magnitude})
        return {key: tensor.detach() for key, tensor in state.items()}

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter."""
        self._check(name)
        for parts in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if name in parts:
                yield from parts[name].parameters()

    def extra_repr(self) -> str:
        """Sizes and adapters."""
        listed = ", ".join(f"{name}: r={one.r}" for name, one in self.settings.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, adapters=({listed})"

    def _check(self, *names: str) -> None:
        for name in names:
            if name not in self.settings:
                raise ValueError(f"adapter {name!r} is unknown, the layer has {', '.join(map(repr, self.settings)) or 'none'}")

    def _chosen(self, names: str | Sequence[str]) -> list[str]:
        """The names as a list, each of them once."""
        chosen = [names] if isinstance(names, str) else list(names)
        self._check(*chosen)
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"adapters: expected each once, got {', '.join(map(repr, chosen))}")
        return chosen

    def _listed(self, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor], list[float]]:
        pairs = [self.factors(name) for name in names]
        return [A for A, _ in pairs], [B for _, B in pairs], [self.settings[name].scaling for name in names]

    def _drops(self, name: str) -> bool:
        return self.training and isinstance(self.lora_dropout[name], nn.Dropout)

    def _dropped(self, x: Tensor, name: str) -> Tensor:
        dropped: Tensor = self.lora_dropout[name](x)
        return dropped

    def _applied(self, x: Tensor, names: Sequence[str], base: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        A, B, scales = self._listed(names)
        return lowrank_apply(x, A, B, 1.0, None, base, bias, scale=scales)

    def _dora_part(self, x: Tensor, name: str) -> Tensor:
        """What a DoRA adapter adds to the base's output; the norm is a constant, as in section 4.3 of the paper."""
        A, B = self.factors(name)
        magnitude = self.magnitude(name)
        assert magnitude is not None
        weight, scaling = self.base_layer.weight, self.settings[name].scaling
        with torch.no_grad():
            norms = lowrank_norm(weight, A, B, scaling)
        dropped = self._dropped(x, name)
        plain = nn.functional.linear(dropped, weight)
        ratio = (magnitude / norms).to(plain.dtype)
        return (ratio - 1) * plain + ratio * lowrank_apply(dropped, A[None], B[None], scaling)

    def _numbers(self, tasks: Tasks, x: Tensor) -> Tensor:
        if isinstance(tasks, Tensor):
            return tasks.to(x.device)
        if x.dim() < 2 or len(tasks) != x.shape[0]:
            raise ValueError(f"tasks: expected {x.shape[0]} names, one for each sample, got {len(tasks)}")
        self._check(*(name for name in tasks if name != BASE))
        places = {name: place for place, name in enumerate(self.settings)} | {BASE: -1}
        return torch.tensor([places[name] for name in tasks], device=x.device)

    def _mixed(self, x: Tensor, tasks: Tasks) -> Tensor:
        if self.merged_adapters:
            raise RuntimeError(f"tasks: {', '.join(self.merged_adapters)} are merged; unmerge first")
        names = self.adapters
        if len(self.lora_magnitude_vector):
            raise ValueError(f"tasks: a batch cannot mix DoRA's adapters ({', '.join(self.lora_magnitude_vector)}) with others")
        numbers = self._numbers(tasks, x)
        if not names:
            raise ValueError("tasks: the layer has no adapters")
        weight, bias = self.base_layer.weight, self.base_layer.bias
        A, B, scales = self._listed(names)
        if not any(self._drops(name) for name in names):
            return lowrank_apply(x, A, B, 1.0, numbers, weight, bias, scale=scales)
        rates = {one.p if isinstance(one, nn.Dropout) else 0.0 for one in self.lora_dropout.values()}
        if len(rates) > 1:
            raise ValueError(f"tasks: the adapters of a batch must have one dropout in training, they have {sorted(rates)}")
        part = lowrank_apply(self._dropped(x, names[0]), A, B, 1.0, numbers, scale=scales)
        return nn.functional.linear(x, weight, bias) + part

    def _merge_into(self, weight: Tensor, names: Sequence[str]) -> None:
        if not any(name in self.lora_magnitude_vector for name in names):
            A, B, scales = self._listed(names)
            lowrank_merge_(weight, A, B, scale=scales)
            return
        weight.copy_(self._merged(weight, names))

    def _merged(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """The weight with adapters merged: all at once, or one after the other where one is DoRA's, as PEFT does."""
        if not any(name in self.lora_magnitude_vector for name in names):
            A, B, scales = self._listed(names)
            return lowrank_merge(weight, A, B, scale=scales)
        for name in names:
            a, b = self.factors(name)
            magnitude, scaling = self.magnitude(name), self.settings[name].scaling
            weight = lowrank_merge(weight, a, b, scaling) if magnitude is None else dora_merge(weight, a, b, magnitude, scaling)
        return weight
