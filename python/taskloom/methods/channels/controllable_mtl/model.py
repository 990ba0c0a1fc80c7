"""One encoder and a decoder per task, whose widths are chosen call by call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from taskloom.methods.channels.controllable_mtl.config import NetworkWidth, WidthConfig
from taskloom.nn import SlimConv2d, SlimLinear, Width, use_width

Features = Tensor | Sequence[Tensor]

ENCODER = "encoder"


def decoder_path(task: str) -> str:
    """Where a task's decoder is in the model."""
    return f"decoders.{task}"


def _free_layers(network: nn.Module) -> list[str]:
    """The slim layers, by path, whose outputs follow a width; those of grouped convolutions follow their inputs."""
    return [
        path
        for path, module in network.named_modules()
        if (isinstance(module, SlimLinear) and module.slim_output)
        or (isinstance(module, SlimConv2d) and module.slim_output and module.groups == 1)
    ]


def _checked_parts(encoder: nn.Module, parts: Sequence[str | Sequence[str]] | None) -> tuple[tuple[str, ...], ...]:
    layers = _free_layers(encoder)
    if parts is None:
        return tuple((path,) for path in layers)
    found = tuple((part,) if isinstance(part, str) else tuple(part) for part in parts)
    named = [path for part in found for path in part]
    for path in named:
        if sum(path == other for other in named) > 1:
            raise ValueError(f"SlimMultiTask: parts: expected every path once, got {path!r} again")
        if not any(layer == path or layer.startswith(f"{path}.") for layer in layers):
            raise ValueError(f"SlimMultiTask: parts: expected paths of the encoder's slim layers or of their parents, got {path!r}")
    for layer in layers:
        if not any(layer == path or layer.startswith(f"{path}.") for path in named):
            raise ValueError(f"SlimMultiTask: parts: expected every slim layer of the encoder in a part, {layer!r} is in none")
    return found


class SlimMultiTask(nn.Module):
    """A network of several tasks whose encoder and decoders run at widths of their own, on one set of weights.

    Parameters
    ----------
    encoder
        Takes x, gives features ``[N, C, ...]``, or a sequence of such (those of its stages, the last of them the deepest). Its layers are
        :class:`taskloom.nn.SlimConv2d`, ``SlimLinear`` and ``SlimNorm2d``, or others, which do not change.
    decoders
        By task: takes what the encoder gives, returns the task's output. Its last layer has ``slim_output=False``. A flatten before a
        linear layer must be channel-major, as torch's is.
    parts
        What has one width each in a configuration per layer: paths in the encoder, of layers or of what holds them, or sequences of paths
        that share a width, such as the layers that end in one residual sum. Every slim layer is in one. Default None: each slim layer.

    Raises
    ------
    ValueError
        If there is no decoder, or ``parts`` are not as described.

    Notes
    -----
    Decoders have two sizes: what they take follows from the encoder's width, what they compute from their own. Source: arXiv 2308.11744.
    """

    def __init__(self, encoder: nn.Module, decoders: Mapping[str, nn.Module], parts: Sequence[str | Sequence[str]] | None = None) -> None:
        super().__init__()
        if not decoders:
            raise ValueError("SlimMultiTask: decoders: expected one per task, got none")
        self.parts = _checked_parts(encoder, parts)
        self.encoder = encoder
        self.decoders = nn.ModuleDict(decoders)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order in which they were given."""
        return tuple(self.decoders)

    def decoder_parts(self, task: str) -> tuple[tuple[str, ...], ...]:
        """As :attr:`parts`, of a task's decoder: each of its slim layers whose outputs follow a width."""
        return tuple((path,) for path in _free_layers(self.decoders[task]))

    def check_tasks(self, what: str, tasks: Iterable[str], every: bool = False) -> None:
        """Raise KeyError if a task is unknown, or (``every``) if one is missing."""
        given = list(tasks)
        for task in given:
            if task not in self.decoders:
                raise KeyError(f"{what}: there is no task {task!r}; the tasks are {', '.join(self.tasks)}")
        for task in self.tasks:
            if every and task not in given:
                raise KeyError(f"{what}: expected every task, {task!r} is missing")

    def widths(self, config: WidthConfig) -> dict[str, Width]:
        """The configuration as :func:`taskloom.nn.use_width` takes it.

        Raises
        ------
        KeyError
            If it has a task that the model has not, or lacks one.
        ValueError
            If widths per layer are not as many as the parts.
        """
        self.check_tasks("config.decoders", config.decoders, every=True)
        found = self._network_widths("config.encoder", ENCODER, self.parts, config.encoder)
        for task, width in config.decoders.items():
            found |= self._network_widths(f"config.decoders[{task!r}]", decoder_path(task), self.decoder_parts(task), width)
        return found

    def _network_widths(self, what: str, root: str, parts: tuple[tuple[str, ...], ...], width: NetworkWidth) -> dict[str, Width]:
        if not isinstance(width, tuple):
            if width < 1 and not parts:
                raise ValueError(f"{what}: expected 1.0 for a network without slim layers, got {width}")
            return {root: width} if parts else {}
        if len(width) != len(parts):
            raise ValueError(f"{what}: expected {len(parts)} widths, one per part, got {len(width)}")
        return {f"{root}.{path}" if path else root: own for part, own in zip(parts, width, strict=True) for path in part}

    def features(self, x: Tensor, config: WidthConfig) -> Features:
        """What the encoder gives at a configuration."""
        with use_width(self, self.widths(config)):
            features: Features = self.encoder(x)
            return features

    def forward(self, x: Tensor, config: WidthConfig, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The outputs of the tasks (default None: of all) at a configuration.

        Raises
        ------
        KeyError
            If a task is unknown, or the configuration lacks one.
        RuntimeError
            If a batch normalisation has no statistics for this configuration: use :func:`calibrate`.
        """
        return self.run(x, config, tasks)[1]

    def run(self, x: Tensor, config: WidthConfig, tasks: Sequence[str] | None = None) -> tuple[Features, dict[str, Tensor]]:
        """The features and the outputs, as :meth:`features` and :meth:`forward` give them."""
        chosen = self.tasks if tasks is None else tuple(tasks)
        self.check_tasks("tasks", chosen)
        with use_width(self, self.widths(config)):
            z: Features = self.encoder(x)
            return z, {task: self.decoders[task](z) for task in chosen}
