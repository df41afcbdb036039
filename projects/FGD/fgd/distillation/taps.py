"""Which tensor of a level is distilled, after or before the norm of the FPN, and recording it.

Detectron2's convolutions apply their norm themselves, so the tensor before it is no output of any
module; it is the input of the norm.
"""

from functools import partial
from typing import Callable, Dict, Mapping, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from ..errors import UserError

FEATURES = ("auto", "output", "pre_norm")  # values of MODEL.DISTILLER.FEATURES


class Source(NamedTuple):
    """Where one level's tensor is found in a backbone's forward."""

    output: str  # name of the backbone's output
    norm: str = ""  # path of a submodule whose input it is; "" = the output itself
    stage: bool = False  # an output of the backbone's bottom-up network instead

    def __str__(self) -> str:
        return f"{self.output} before {self.norm}" if self.norm else self.output


Sources = Mapping[str, Source]  # by the student's name of the level


def choose_sources(
    kind: str, student: nn.Module, teacher: Optional[nn.Module], partners: Mapping[str, str]
) -> Tuple[Dict[str, Source], Dict[str, Source]]:
    """Sources of student and teacher, by the student's name of each level.

    Both sides are taken at the same place: "output", what heads read, or "pre_norm", the result of
    the level's last convolution, which is where the authors' code takes it. A level without a norm
    there, such as p6 and p7 of most necks, is its own convolution's result: p6 before the ReLU
    that p7 begins with. "auto" is "pre_norm" if a distilled level of either side ends in group
    normalisation, else "output". So it is for the layer normalisation of ViTDet's pyramid and its
    like: what it is given has another scale in each cell, which heads never see.

    Args:
        partners: the student's level → the teacher's; "" where no teacher is involved, and then
            the teacher may be None.
    Raises:
        UserError: not one of `FEATURES`; "pre_norm", but no distilled level ends in a norm.
    """
    check_kind(kind)
    sides = [
        {level: _source(backbone, name) for level, name in names.items() if name}
        for backbone, names in ((student, {x: x for x in partners}), (teacher, partners))
    ]
    norms = [
        backbone.get_submodule(source.norm)
        for backbone, side in zip((student, teacher), sides)
        for source in side.values()
        if source.norm
    ]
    if kind == "pre_norm" and not norms:
        raise UserError(
            "MODEL.DISTILLER.FEATURES pre_norm: no distilled level of student or teacher ends in a "
            "norm (MODEL.FPN.NORM); use 'output', which is the same here"
        )
    if kind == "output" or kind == "auto" and not any(isinstance(x, nn.GroupNorm) for x in norms):
        sides = [after_norms(side) for side in sides]
    return sides[0], sides[1]


def _source(backbone: nn.Module, name: str) -> Source:
    if name in backbone.output_shape():
        return Source(name, find_norm(backbone, name))
    return Source(name, stage=True)


def check_kind(kind: str) -> None:
    """Raise UserError unless ``kind`` is one of `FEATURES`."""
    if kind not in FEATURES:
        raise UserError(f"MODEL.DISTILLER.FEATURES: {kind!r} is not one of {', '.join(FEATURES)}")


def after_norms(sources: Optional[Sources]) -> Optional[Sources]:
    """The same levels as heads read them."""
    if sources is None:
        return None
    return {level: source._replace(norm="") for level, source in sources.items()}


def find_norm(backbone: nn.Module, level: str) -> str:
    """Path of the norm that a pyramid level ends in; "" if it has none.

    Levels of Detectron2's FPN, and of every neck built from it, come from ``fpn_output{k}`` or,
    above those, from ``top_block.p{k}``; those of ViTDet's pyramid from the last module of
    ``simfp_{k}``.
    """
    modules = dict(backbone.named_modules())
    number = level.removeprefix("p")
    simple = modules.get(f"simfp_{number}", ())
    paths = (
        f"fpn_output{number}.norm",
        f"top_block.{level}.norm",
        f"simfp_{number}.{len(simple) - 1}.norm",
    )
    return next((path for path in paths if path in modules), "")


def describe_sources(sources: Sources) -> str:
    """For the log: "p3 before fpn_output3.norm, p6"."""
    return ", ".join(str(source) for source in sources.values())


class _Recorder:
    """Hooks that turn the output of a backbone's forward into the tensors of its sources.

    Args:
        sources: None for all outputs under their own names. wanted: whether a forward is to be
            recorded; of others nothing is kept.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sources: Optional[Sources],
        wanted: Callable[[], bool] = lambda: True,
    ):
        self._sources, self._wanted = sources, wanted
        self._inputs: Dict[str, Tensor] = {}
        self._stages: Dict[str, Tensor] = {}
        chosen = (sources or {}).values()
        self.handles = [
            backbone.get_submodule(path).register_forward_pre_hook(partial(self._save, path))
            for path in {source.norm for source in chosen if source.norm}
        ]
        if any(source.stage for source in chosen):
            self.handles.append(backbone.bottom_up.register_forward_hook(self._save_stages))

    def _save(self, path: str, norm: nn.Module, args: tuple) -> None:
        if self._wanted():
            self._inputs[path] = args[0]

    def _save_stages(self, body: nn.Module, args: tuple, output: Mapping[str, Tensor]) -> None:
        if self._wanted():
            self._stages = dict(output)

    def select(self, output: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """Level → tensor of the forward that just returned ``output``; forgets what it held."""
        inputs, self._inputs = self._inputs, {}
        stages, self._stages = self._stages, {}
        if self._sources is None:
            return dict(output)

        def find(source: Source) -> Tensor:
            if source.norm:
                return inputs[source.norm]
            return (stages if source.stage else output)[source.output]

        return {level: find(source) for level, source in self._sources.items()}


def read_levels(
    backbone: nn.Module, images: Tensor, sources: Optional[Sources]
) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """Run a backbone once, in whatever mode it is.

    Returns:
        level → (N, C, H, W), with sources None all outputs under their own names; and the outputs.
    """
    recorder = _Recorder(backbone, sources)
    try:
        output = backbone(images)
        return recorder.select(output), output
    finally:
        for handle in recorder.handles:
            handle.remove()


class FeatureTap:
    """Records one training forward of a backbone and hands it out exactly once.

    It holds references to the maps, no copies, and none after they were handed out.
    """

    def __init__(self, backbone: nn.Module, sources: Optional[Sources] = None):
        self._record: Optional[Tuple[Dict[str, Tensor], Tuple[int, int]]] = None
        # Evaluation must not keep features alive.
        self._recorder = _Recorder(backbone, sources, wanted=lambda: backbone.training)
        backbone.register_forward_hook(self._save)

    def _save(self, backbone: nn.Module, args: tuple, output: Dict[str, Tensor]) -> None:
        if backbone.training:
            self._record = self._recorder.select(output), tuple(args[0].shape[-2:])

    def pop(self) -> Tuple[Dict[str, Tensor], Tuple[int, int]]:
        """(features by level, padded (height, width) of the batch) of the last training forward.

        Raises:
            RuntimeError: the backbone has not run in training mode since the last call.
        """
        if self._record is None:
            raise RuntimeError("the student's backbone did not run, or its features were taken")
        record, self._record = self._record, None
        return record
