"""Runs the two towers of an open_clip model: texts grouped by length and cut, compiled if asked, within memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from aligncurate.errors import UserError
from aligncurate.progress import notice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROUND = 16  # compiled towers see texts of 16, 32, … tokens, so that few shapes are compiled
_LARGEST_BATCH = 512  # beyond this a GPU gains nothing
_TOKENS = 16  # of text for each image of a batch: captions have about as many
_SHARE = 0.6  # of the free memory that a batch may use; the rest is for fragmentation and for images being uploaded


class Towers:
    """The towers on their device.

    Args:
        model: an open_clip model in evaluation mode on `device`.
        normalize: decoded pixels to float32 for the model.
        dtype: of the model's computation.
        batch: most rows that go through a tower at once.
        compiled: use torch.compile for fixed shapes, and CUDA graphs on a GPU.

    Arguments are attributes too. `batch` is halved for the rest of the run when the device runs out of memory.
    """

    def __init__(
        self,
        model: Any,
        normalize: Callable[[Tensor], Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch: int = 32,
        compiled: bool = False,
    ) -> None:
        self.device, self.dtype, self.batch = device, dtype, batch
        self.model, self._normalize, self._fixed = model, normalize, compiled
        self._cut = causal_text_tower(model)
        wrap: Callable[[Any], Any] = _Compiled if compiled else lambda tower: tower
        self._image, self._text = wrap(model.encode_image), wrap(self._encode_text)

    def embed(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings, float32 [n, D] each on the CPU, of any number of images and texts.

        Args:
            pixels: decoded uint8 or normalized float32, [n, 3, H, W], on any device.
            tokens: int64 [n, context].

        Texts of similar length share a batch, cut at the longest of them: the tower is causal and pools at the end
        token, so later tokens change nothing. A tower that is not causal gets the full context.
        Raises UserError when not even one row fits into memory.
        """
        import torch

        with torch.inference_mode():
            images = self._in_batches(pixels, self._embed_images, lambda done: self.batch)
            lengths = self._lengths(tokens)
            order = torch.argsort(lengths, stable=True)
            widths = self._widths(lengths[order], tokens.shape[1]).tolist()
            rows = self._in_batches(tokens[order], self._embed_texts, lambda done: self._texts(widths[done:]))
            texts = rows[torch.argsort(order)]
        return images, texts

    def _texts(self, widths: Sequence[int]) -> int:
        """How many texts of these widths, in ascending order, make the next batch."""
        rows = 1
        while rows < len(widths) and rows < self._texts_at_once(widths[rows]):
            rows += 1
        return rows

    def _texts_at_once(self, width: int) -> int:
        """Most texts in a batch that is cut at `width` tokens: it has a fixed number of tokens, not of texts."""
        return self.batch if self._cut is None else max(1, self.batch * _TOKENS // width)

    def _widths(self, lengths: Tensor, context: int) -> Tensor:
        """At how many tokens texts of these lengths may be cut."""
        return (-(-lengths // _ROUND) * _ROUND).clamp(max=context) if self._fixed else lengths

    def upload(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, H, W] on the device.

        On a GPU this is a copy from pinned memory, on a stream of its own, so that the GPU computes meanwhile. If they
        do not fit into its memory, they stay on the CPU, and `embed` moves a batch at a time.
        """
        import torch

        if self.device.type != "cuda":
            return pixels
        try:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                moved = pixels.pin_memory().to(self.device, non_blocking=True)
            stream.synchronize()  # the calling thread waits, not the one that encodes
            return moved
        except torch.OutOfMemoryError:
            pass  # leave the handler first: its traceback keeps the tensors of the failed attempt
        torch.cuda.empty_cache()
        return pixels

    def fitting_batch(self, size: int, context: int) -> int:
        """The batch that a GPU's free memory allows for images of `size` pixels, measured with two small ones."""
        import torch

        # Not compiled: that would compile every batch size tried, each padded to `batch`.
        plain = Towers(self.model, self._normalize, self.device, self.dtype)
        peaks = []
        for rows in (8, 8, 24):  # the first also allocates what all later ones share
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            tokens = torch.zeros(rows, context, dtype=torch.long)
            tokens[:, -1] = self._end_token()  # texts of full length
            plain.batch = rows
            plain.embed(torch.zeros(rows, 3, size, size, dtype=torch.uint8), tokens)
            peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
        torch.cuda.empty_cache()
        return batch_that_fits(torch.cuda.mem_get_info(self.device)[0], (8, peaks[1]), (24, peaks[2]))

    def _in_batches(self, rows: Tensor, embed: Callable[[Tensor], Tensor], size: Callable[[int], int]) -> Tensor:
        """`embed` over `rows`, a batch at a time, whose size follows from the rows done; it shrinks without memory."""
        import torch

        found: list[Tensor] = []
        done = 0
        while done < len(rows):
            piece = rows[done : done + size(done)]
            try:
                found.append(embed(piece))
            except torch.OutOfMemoryError:
                smaller = (self.batch if self._fixed else min(self.batch, len(piece))) // 2
            else:
                done += len(piece)
                continue
            # Outside the handler, whose traceback keeps the tensors of the failed attempt.
            if not smaller:
                raise UserError(
                    "the device has not enough memory for even one pair; use a smaller --model or --device cpu."
                )
            self.batch = smaller
            notice(f"the device ran out of memory; continuing with batches of {smaller} pairs.")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return torch.cat([piece.cpu() for piece in found])

    def _embed_images(self, pixels: Tensor) -> Tensor:
        ready = self._normalize(pixels.to(self.device)).to(self.dtype)
        return self._unit(self._image, ready, self.batch)

    def _embed_texts(self, tokens: Tensor) -> Tensor:
        width = int(self._widths(self._lengths(tokens), tokens.shape[1]).max())
        return self._unit(self._text, tokens[:, :width].to(self.device), self._texts_at_once(width))

    def _unit(self, tower: Callable[[Tensor], Tensor], rows: Tensor, full: int) -> Tensor:
        """Unit embeddings of `rows`; a compiled tower always sees a `full` batch."""
        import torch

        count = len(rows)
        if self._fixed and count < full:
            rows = torch.cat([rows, rows[:1].expand(full - count, *rows.shape[1:])])
        return torch.nn.functional.normalize(tower(rows)[:count].float(), dim=-1)

    def _end_token(self) -> int:
        return _eos(self._cut) if self._cut is not None and _pool(self._cut) == "eos" else 1

    def _lengths(self, tokens: Tensor) -> Tensor:
        """How many tokens of each text matter, up to the end token, int64 [n]."""
        import torch

        if self._cut is None:
            return torch.full((len(tokens),), tokens.shape[1])
        return _pooled_at(self._cut, tokens) + 1

    def _encode_text(self, tokens: Tensor) -> Tensor:
        """open_clip's encode_text (CLIP and TextTransformer), for the first L tokens only."""
        import torch

        tower = self._cut
        if tower is None:
            return cast("Tensor", self.model.encode_text(tokens))
        length = tokens.shape[1]
        x: Tensor = tower.token_embedding(tokens).to(self.dtype) + tower.positional_embedding[:length].to(self.dtype)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
        x = x[torch.arange(len(x), device=x.device), _pooled_at(tower, tokens)]
        if tower.text_projection is None:
            return x
        if isinstance(tower.text_projection, torch.nn.Linear):
            return cast("Tensor", tower.text_projection(x))
        return x @ cast("Tensor", tower.text_projection)


def causal_text_tower(model: Any) -> Any:
    """The text tower of an open_clip model, if it is causal and pools at the end token; else None."""
    from open_clip.model import CLIP
    from open_clip.transformer import TextTransformer

    tower: Any = model if isinstance(model, CLIP) else getattr(model, "text", None)
    plain = type(tower) is TextTransformer and tower.cls_emb is None and not tower.output_tokens
    fits = (plain or isinstance(tower, CLIP)) and tower.attn_mask is not None
    return tower if fits and _pool(tower) in ("argmax", "eos") else None


def _pool(tower: Any) -> str:
    return str(tower.text_pool_type if hasattr(tower, "text_pool_type") else tower.pool_type)


def _pooled_at(tower: Any, tokens: Tensor) -> Tensor:
    """The position that the tower pools at, its largest id or the end token, int64 [n]."""
    if _pool(tower) == "argmax":
        return tokens.argmax(-1)
    return (tokens == _eos(tower)).int().argmax(-1)


def _eos(tower: Any) -> int:
    return int(tower.text_eos_id if hasattr(tower, "text_eos_id") else tower.eos_id)


def batch_that_fits(free: int, few: tuple[int, int], many: tuple[int, int]) -> int:
    """The largest power of two, up to 1,024, of rows that fit into memory.

    Args:
        free: bytes.
        few, many: two measurements, (rows, bytes used); memory is taken to grow linearly with rows.
    """
    each = max(1.0, (many[1] - few[1]) / (many[0] - few[0]))
    rows = (free * _SHARE - max(0.0, few[1] - few[0] * each)) / each
    return int(2 ** min(_LARGEST_BATCH.bit_length() - 1, max(0, int(rows).bit_length() - 1))) if rows >= 1 else 1


class _Compiled:
    """A tower compiled for each input shape; on a GPU each is captured as a CUDA graph and replayed."""

    def __init__(self, tower: Callable[[Tensor], Tensor]) -> None:
        import torch

        self._tower = torch.compile(tower, dynamic=False)
        self._graphs: dict[tuple[int, ...], tuple[Any, Tensor, Tensor]] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.device.type != "cuda":
            return self._tower(rows)
        shape = tuple(rows.shape)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(rows)
        graph, given, result = self._graphs[shape]
        given.copy_(rows)
        graph.replay()
        return result.clone()

    def _capture(self, rows: Tensor) -> tuple[Any, Tensor, Tensor]:
        import torch

        given = rows.clone()
        side = torch.cuda.Stream(rows.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(side):  # compiling and kernel selection must be done before the capture
            for _ in range(3):
                self._tower(given)
        torch.cuda.current_stream(rows.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads keep copying
            result = self._tower(given)
        return graph, given, result
