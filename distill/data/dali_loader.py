"""The loader that decodes with NVIDIA DALI, on the GPU where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.config import Config
from distill.data.catalogue import PreparedSet
from distill.data.dali_source import Source, numbers_of
from distill.data.decode import read_image
from distill.data.geometry import Cut, Views, take_view
from distill.data.ordered_loader import OrderedLoader, Reading, Shares
from distill.data.samples import Samples
from distill.errors import DataError, MissingPackageError

PACKAGE = "nvidia.dali"
INSTALL = "pip install 'guard-distill[dali]', or 'guard-distill[dali-cuda12]' beside a torch of CUDA 12"


class DaliLoader(OrderedLoader):
    """Batches from image files. Crops and flips are those of ``FolderLoader``; pixels differ by what decoding and
    interpolation round differently. Files are read by ``workers`` threads and decoded by as many of DALI, or by the
    GPU; those that are not plain JPEGs (see ``Index``) are decoded by Pillow.

    A pipeline of DALI is kept from epoch to epoch: each one that is built leaves some memory behind.

    Attributes:
        whole: whether DALI resizes and flips too, as it does on a GPU. On a CPU torch resizes four times as fast.

    Raises:
        MissingPackageError: when DALI is not installed.
    """

    def __init__(self, samples: Samples, reading: Reading):
        _library()
        super().__init__(samples, reading)
        self.whole = self.device.type == "cuda"
        self._idle: dict[tuple[Any, ...], tuple[_Feed, Any]] = {}

    def _images(self, epoch: int, size: int, shares: Shares) -> Generator[Tensor, None, None]:
        if not shares:
            return
        shapes = self.samples.index.shapes
        batches = [partial(self._views, epoch, size, share, shapes[share]) for share in shares]
        example = batches[0]()
        kind = tuple((type(step), getattr(step, "antialias", None)) for step in example.steps)
        feed, pipeline = self._idle.pop(kind, (None, None))
        if feed is None:
            feed = _Feed()
            pipeline = self._pipeline(feed, example)
        feed.source = source = Source(self.samples, batches, self.reading.workers, self.whole)
        sound = False
        try:
            for _ in shares:
                sound = False
                images = self._next(pipeline, source)
                sound = True
                yield images
                del images
        finally:
            source.close()
            feed.source = None
            if sound and self._drained(pipeline):
                self._idle[kind] = feed, pipeline
            del pipeline  # The threads of one that is not kept end with the last reference.

    def _drained(self, pipeline: Any) -> bool:
        """Take what DALI has begun and nobody wants, so that the pipeline can be used again. Returns whether it can."""
        try:
            while True:
                self._run(pipeline)
        except StopIteration:
            pipeline.reset()
            return True
        except RuntimeError:
            return False

    def _pipeline(self, feed: _Feed, example: Views) -> Any:
        """A pipeline from the files and numbers of a source to images: uint8 (H, W, 3)."""
        fn, types, pipeline_class = _library()
        gpu = self.device.type == "cuda"
        decoding = {
            "device": "mixed" if gpu else "cpu",
            "output_type": types.RGB,
            "adjust_orientation": False,
            "use_fast_idct": False,
            "jpeg_fancy_upsampling": True,  # On a GPU as on a CPU.
        }
        pipeline = pipeline_class(
            batch_size=self.order.largest_share,
            num_threads=max(1, self.reading.workers),
            device_id=self._device_index() if gpu else None,
            prefetch_queue_depth=2,
            exec_dynamic=True,  # Older versions need to be told: outputs stay whole when DALI goes on.
        )
        with pipeline:
            inputs = 1 + len(numbers_of(example, self.whole))
            images, *numbers = fn.external_source(source=feed, num_outputs=inputs, batch=True)
            steps = example.steps
            if isinstance(steps[0], Cut):
                box = {"start": numbers.pop(0), "shape": numbers.pop(0), "axes": (0, 1)}
                images, steps = fn.decoders.image_slice(images, **box, **decoding), steps[1:]
            else:
                images = fn.decoders.image(images, **decoding)
            for step in steps if self.whole else []:
                if isinstance(step, Cut):
                    box = {"start": numbers.pop(0), "shape": numbers.pop(0), "axes": (0, 1)}
                    images = fn.slice(images, **box, out_of_bounds_policy="pad", fill_values=0)
                else:
                    linear = {"interp_type": types.INTERP_LINEAR, "antialias": step.antialias}
                    images = fn.resize(images, size=numbers.pop(0), **linear)
            if self.whole:
                images = fn.flip(images, horizontal=numbers.pop(0))
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _device_index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _next(self, pipeline: Any, source: Source) -> Tensor:
        """The next batch, in memory of its own: uint8 (N, 3, size, size)."""
        with self._current():
            try:
                (images,) = self._run(pipeline)
            except StopIteration:
                raise source.error or RuntimeError("DALI gave fewer batches than it was to give.") from None
            except RuntimeError as error:
                raise self._fault(error, source) from error
            views = source.under_way.popleft()
            if self.whole:
                return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).contiguous()
        rest = replace(views, steps=views.steps[isinstance(views.steps[0], Cut) :])
        taken = [take_view(np.asarray(image), rest, number) for number, image in enumerate(images)]
        return torch.from_numpy(np.stack(taken))

    def _run(self, pipeline: Any) -> Any:
        with self._current():
            if self.device.type != "cuda":
                return pipeline.run()
            # DALI waits for torch's stream before it uses this memory again, so for the copy of it.
            return pipeline.run(torch.cuda.current_stream())

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _fault(self, error: RuntimeError, source: Source) -> Exception:
        """What to raise for an error of DALI: it names no file."""
        for position in [position for views in source.under_way for position in views.share.tolist()]:
            try:
                read_image(self.samples.path(position))
            except DataError as found:
                return found
        if "memory" in str(error):
            return error
        cause = (str(error).partition("encountered:")[2] or str(error)).strip().partition("\n")[0].rstrip(" .:")
        return DataError(
            f"NVIDIA DALI cannot decode an image of {self.samples.root} that Pillow can ({cause}); use loader=folder."
        )


class _Feed:
    """What a pipeline asks for the next batch: a source that changes with the epochs."""

    def __init__(self) -> None:
        self.source: Source | None = None

    def __call__(self) -> list[Any]:
        if self.source is None:
            raise StopIteration
        return self.source()


def _library() -> tuple[Any, Any, Any]:
    """DALI's ``fn``, ``types`` and ``Pipeline``."""
    try:
        from nvidia.dali import Pipeline, fn, types
    except (ImportError, OSError) as error:
        raise MissingPackageError(f"DALI could not be imported ({error}); install it with: {INSTALL}.") from error
    return fn, types, Pipeline


def build(config: Config, prepared: PreparedSet, samples: Samples, reading: Reading) -> DaliLoader:
    """The loader of ``loader=dali``."""
    return DaliLoader(samples, reading)
