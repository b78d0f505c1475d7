"""Text in, few bytes out, and the same bytes back: the public face of the codec."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from basin_lens.codec.container import CHUNK_TOKENS, DTYPES, METHODS, MOST_STREAMS, Container, Setting, read, store
from basin_lens.codec.lockstep import chunk_tokens, decode_tokens, encode_tokens, probe, stream_lengths, token_coder
from basin_lens.codec.rank_coders import RANK_CODERS
from basin_lens.codec.reading import Estimate, read_pass
from basin_lens.errors import CodecError, CorruptFileError, WrongEnvironmentError, WrongModelError
from basin_lens.model import (
    HookedModel,
    Stepper,
    cache_bytes,
    check_model,
    device_of,
    fingerprint,
    full_name,
    n_context,
    needed_tokenizer,
    parameters_of,
    start_token,
    thread_count,
    tokenizer_fingerprint,
    vocabulary_size,
)
from basin_lens.model import stepping as open_stepper
from basin_lens.texts.tokens import token_strings
from basin_lens.values import hides_bars, whole_numbers

_LEAST_TOKENS = 256  # of a stream: shorter ones would spend most of their tokens warming up
_MOST_CACHE = 8 << 30  # bytes of keys and values
_LONGEST = 64 << 20  # bytes of a text; at some hundred tokens per second that is days
_LONGEST_PIECE = 1 << 20  # characters that the tokenizer sees at once
_PACKAGES = ("torch", "transformer-lens", "transformers", "tokenizers", "numpy", "constriction")


class TextCodec:
    """Lossless coding of text with the model's predictions; any bytes go in, and the same bytes come out.

    `"direct"`: range coding with the model's probabilities; the size is the model's own cross-entropy and a few bytes.
    `"ranks"`: each token becomes its rank in the prediction (0: the first choice), and the ranks are coded without the
    probabilities.

    The text is cut into streams that advance together, so that the weights are read once for all of them. Encoder and decoder must
    compute the same numbers to the last bit: the file holds fingerprints of model and tokenizer, the thread count, and a probe of
    the arithmetic, and the decoder refuses before any output where they differ (another processor may be refused). What the model
    cannot code (not UTF-8, text that its tokenizer changes, short or random text that would not get smaller) is stored by zstd or
    raw.

    The weights are not counted in a file's size. Famous text was probably seen in training, and codes smaller for it.

    Args:
        model: a `TransformerBridge` or `HookedTransformer` with a fast tokenizer, in any state.
        method: `"direct"` or `"ranks"`.
        backend: of ranks, `"zlib"`, `"huffman"`, `"adaptive"` (default), `"zipf"` or `"entropy"`; of direct, `"range"`.
        streams: most streams, 1 to 256; a text gets one for each 256 of its tokens. More is faster and a little larger.
        context: tokens after which every stream starts anew; the model's context if that is shorter.
        threads: of torch while encoding (the decoder follows the file); None: as they are set.
        progress: show a bar.

    Raises:
        ModelError: not a decoder-only model, or no fast tokenizer.
        CodecError: an unknown method or back end, streams or context out of range, or keys and values of more than 8 GiB.

    Source: Shannon 1951 (ranks); Deletang et al. 2024; Bellard, ts_zip.

    Example:
        >>> import basin_lens as bl
        >>> codec = bl.codec.TextCodec(bl.load_model(), streams=1)
        >>> text = "Four score and seven years ago our fathers brought forth on this continent, a new nation. " * 12
        >>> file = codec.encode(text)
        >>> codec.decode(file).decode() == text, len(file) < 600
        (True, True)
    """

    @whole_numbers(CodecError)
    def __init__(
        self,
        model: HookedModel,
        method: str = "direct",
        backend: str | None = None,
        streams: int = 16,
        context: int = 512,
        *,
        threads: int | None = None,
        progress: bool = False,
    ) -> None:
        check_model(model)
        choices = {"direct": ("range",), "ranks": tuple(RANK_CODERS)}
        if method not in choices:
            raise CodecError(f'expected method "direct" or "ranks", got {method!r}.')
        backend = backend or ("range" if method == "direct" else "adaptive")
        if backend not in choices[method]:
            raise CodecError(f"expected a back end among {', '.join(choices[method])} for method {method!r}, got {backend!r}.")
        if not 1 <= streams <= MOST_STREAMS:
            raise CodecError(f"expected 1 to {MOST_STREAMS} streams, got {streams}.")
        if context < 1:
            raise CodecError(f"expected a context of 1 token or more, got {context}.")
        self._tokenizer_hash = bytes.fromhex(tokenizer_fingerprint(model))[:8]
        self.model, self.method, self.backend, self.streams = model, method, backend, streams
        self.context = min(context, n_context(model))
        self.threads, self.progress = threads, progress

    def encode(self, data: bytes | str, *, verify: bool = True) -> bytes:
        """A file of the codec (see `basin_lens.codec.container`).

        Args:
            data: any bytes, or a text (its UTF-8 is coded), at most 1 GiB; the model takes up to 64 MiB.
            verify: decode the file and compare, which doubles the time, before it is handed out.

        Returns:
            the file; never longer than the data and 72 bytes.

        Raises:
            CodecError: too long, a lone surrogate, or the model does not compute the same numbers twice.
        """
        plain = _as_bytes(data)
        found = self._tokens(plain) if plain else "not told"
        if isinstance(found, str):
            return store(plain, found).to_bytes()
        # First what has to be beaten: the model takes hours where this takes moments, and stops once it has lost.
        stored = store(plain, "no smaller with the model").to_bytes()
        coded = self._coded(plain, found, below=len(stored))
        if coded is None:
            return stored
        if verify and self.decode(coded) != plain:
            raise CodecError(
                "expected the file to decode to its text, got another. This is a fault of basin_lens: please report it."
            )
        return coded

    def decode(self, blob: bytes) -> bytes:
        """The original of a file that `encode` made.

        Method, back end, streams, window and threads are the file's; torch's thread count is put back after.

        Raises:
            UnknownFileError, FileVersionError, TruncatedFileError, CorruptFileError: see `basin_lens.codec.container.read`.
            WrongModelError: written with another model or tokenizer. WrongEnvironmentError: the model computes other numbers here.
        """
        file = read(blob)
        if file.setting is None:
            return file.restored()
        setting = file.setting
        self._check(setting)
        lengths, places = stream_lengths(setting.tokens, setting.streams), setting.places
        if file.tokens != tuple(chunk_tokens(lengths, first, first + places.step) for first in places):
            raise CorruptFileError("expected chunks of whole windows of all streams, got others. Get the file again.")
        coder = token_coder(file.method, file.backend, vocabulary_size(self.model))
        with self.stepping(setting.streams, min(setting.window, setting.steps), setting.threads) as stepper:
            found = probe(stepper, coder)
            if found != setting.probe:
                raise WrongEnvironmentError(
                    f"expected the numbers of the machine that wrote the file ({setting.environment}), got others on this one "
                    f"({_environment(self.model)}; probe {found.hex()}, not {setting.probe.hex()}). Decode it with the same "
                    "versions on the same kind of processor."
                )
            with self._bar("decoding", setting.tokens) as tick:
                tokens = decode_tokens(
                    stepper, file.chunks, setting.tokens, setting.start, setting.window, coder, tick, windows=setting.windows
                )
        return file.checked(self.text_of(tokens))

    def estimate(self, data: bytes | str, *, streams: int = 1) -> Estimate:
        """The ideal size of a text by one full pass: no coder, no file.

        Args:
            data: UTF-8 bytes or a text.
            streams: read as so many streams; 1: as the model reads it, one window of `context` tokens after the other. The file
                that `encode` makes has `streams_for(tokens)` of them.

        Returns:
            bits of each token (`Surprisal` in nats / ln 2, within 1e-3, where the model's default puts BOS first), and their sum.

        Raises:
            CodecError: bytes that the model cannot code.

        Example:
            >>> import basin_lens as bl
            >>> codec = bl.codec.TextCodec(bl.load_model())
            >>> codec.estimate("The cat sat on the mat.").n_tokens
            7
        """
        plain, tokens = self.prepared(data)
        reading = read_pass(self.model, tokens, streams=min(streams, max(1, len(tokens))), window=self.context)
        return Estimate(reading.bits, len(plain))

    @whole_numbers(CodecError)
    def ranks(self, text: bytes | str, *, k: int = 5) -> pd.DataFrame:
        """Each token's rank, probability and bits by one full pass, and what the model expected in its place.

        Args:
            text: UTF-8 bytes or a text.
            k: how many of the model's first choices to list.

        Returns:
            one row per token: `token_id`, `token`, `rank` (0: the first choice), `probability`, `bits`, `entropy` (of the
            prediction, in bits), `top` (k token strings, most likely first), `top_probability` (k numbers).

        Raises:
            CodecError: bytes that the model cannot code, or k out of range.

        Example:
            >>> import basin_lens as bl
            >>> codec = bl.codec.TextCodec(bl.load_model())
            >>> codec.ranks("The cat sat on the mat.").token.tolist()
            ['The', ' cat', ' sat', ' on', ' the', ' mat', '.']
        """
        if not 1 <= k <= vocabulary_size(self.model):
            raise CodecError(f"expected k between 1 and {vocabulary_size(self.model)}, got {k}.")
        _, tokens = self.prepared(text)
        reading = read_pass(self.model, tokens, streams=1, window=self.context, k=k)
        names = token_strings(self.model, {*tokens.tolist(), *reading.top.ravel().tolist()})
        return pd.DataFrame(
            {
                "token_id": tokens,
                "token": [names[token] for token in tokens.tolist()],
                "rank": reading.rank,
                "probability": np.exp2(-reading.bits),
                "bits": reading.bits,
                "entropy": reading.entropy,
                "top": [[names[token] for token in row] for row in reading.top.tolist()],
                "top_probability": reading.top_probability.tolist(),
            }
        )

    def streams_for(self, tokens: int) -> int:
        """Streams of a text of so many tokens: one for each 256, at least 1, at most `streams`."""
        return max(1, min(self.streams, tokens // _LEAST_TOKENS))

    def prepared(self, data: bytes | str) -> tuple[bytes, Int[np.ndarray, " tokens"]]:
        """The text's bytes and its tokens.

        Raises:
            CodecError: bytes that the model cannot code.
        """
        plain = _as_bytes(data)
        found = self._tokens(plain) if plain else np.empty(0, np.int64)
        if isinstance(found, str):
            raise CodecError(
                f"expected a text that the model can code, got one that it cannot: {found}. `encode` stores it by zstd or raw."
            )
        return plain, found

    def text_of(self, tokens: Int[np.ndarray, " n"]) -> bytes:
        """The bytes of some tokens, together: a character's bytes may lie in several of them."""
        text: str = needed_tokenizer(self.model).decode(
            tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text.encode("utf-8", errors="replace")

    def encode_text(self, plain: bytes, tokens: Int[np.ndarray, " n"]) -> bytes:
        """The model's file, be it small or not, unverified; from what `prepared` gave."""
        made = self._coded(plain, tokens)
        assert made is not None
        return made

    def _coded(self, plain: bytes, tokens: Int[np.ndarray, " n"], *, below: int | None = None) -> bytes | None:
        """The model's file, or None as soon as it will not be smaller than `below` bytes."""
        streams = self.streams_for(len(tokens))
        steps = -(-len(tokens) // streams)
        threads = self.threads or torch.get_num_threads()
        windows = -(-CHUNK_TOKENS // (streams * self.context))
        start = start_token(self.model)
        coder = token_coder(self.method, self.backend, vocabulary_size(self.model))
        setting = Setting(
            model=self._fingerprint(),
            tokenizer=self._tokenizer_hash,
            probe=bytes(8),
            streams=streams,
            window=self.context,
            threads=threads,
            dtype=self._dtype(),
            start=start,
            tokens=len(tokens),
            windows=windows,
            environment=_environment(self.model),
        )
        # All of the header but the probe is known, and so its length.
        empty = (b"",) * len(setting.places)
        file = Container(
            self.method, self.backend, len(plain), hashlib.sha256(plain).digest(), empty, (0,) * len(empty), setting=setting
        )
        room = None if below is None else below - len(file.header())
        if room is not None and room <= 0:
            return None
        with self.stepping(streams, min(self.context, steps), threads) as stepper:
            probed = probe(stepper, coder)
            with self._bar("encoding", len(tokens)) as tick:
                made = list(encode_tokens(stepper, tokens, start, self.context, coder, tick, windows=windows, below=room))
        if len(made) < len(empty):
            return None
        chunks, counts = zip(*made, strict=True)
        return replace(file, chunks=chunks, tokens=counts, setting=replace(setting, probe=probed)).to_bytes()

    def _check(self, setting: Setting) -> None:
        """Refuse another model before anything is computed."""
        for what, written, here in (
            ("tokenizer", setting.tokenizer.hex(), self._tokenizer_hash.hex()),
            ("dtype", setting.dtype, self._dtype()),
            ("weights", setting.model.hex(), self._fingerprint().hex()),
        ):
            if written != here:
                raise WrongModelError(
                    f"expected the model that wrote the file ({what} {written}), got {full_name(self.model)} ({what} {here}). "
                    "Load that model, as the same kind and dtype."
                )
        if setting.window > n_context(self.model) or setting.start >= vocabulary_size(self.model):
            raise CorruptFileError(
                f"expected a window and a start token that the model takes, got {setting.window} and {setting.start}. Get the file "
                "again."
            )

    @contextmanager
    def stepping(self, streams: int, window: int, threads: int) -> Iterator[Stepper]:
        """A stepper for so many streams, while torch works with so many threads.

        Raises:
            CodecError: keys and values of more than 8 GiB.
        """
        if (needed := cache_bytes(self.model, streams, window)) > _MOST_CACHE:
            raise CodecError(
                f"expected keys and values of at most {_MOST_CACHE >> 30} GiB, got {needed / 2**30:.1f} GiB for {streams} streams "
                f"of {window} tokens. Use fewer streams or a shorter context."
            )
        with thread_count(threads), open_stepper(self.model, streams, window) as stepper:
            yield stepper

    @contextmanager
    def _bar(self, what: str, tokens: int) -> Iterator[Callable[[int], object]]:
        with tqdm(total=tokens, desc=what, unit="token", disable=hides_bars(self.progress)) as bar:
            yield bar.update

    def _tokens(self, plain: bytes) -> Int[np.ndarray, " n"] | str:
        """The text's tokens, or why the model cannot code it."""
        if len(plain) > _LONGEST:
            return "too long for the model"
        try:
            text = plain.decode("utf-8")
        except UnicodeDecodeError:
            return "not UTF-8"
        # In pieces first; a tokenizer that puts a space before every text gives back the whole alone.
        for pieces in (_pieces(text), [text]):
            tokens = np.concatenate([self._tokens_of(piece) for piece in pieces])
            if len(tokens) and tokens.max() < vocabulary_size(self.model) and self.text_of(tokens) == plain:
                return tokens
        return "the tokenizer does not give the text back"

    def _tokens_of(self, text: str) -> Int[np.ndarray, " n"]:
        return np.array(needed_tokenizer(self.model)(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)

    def _fingerprint(self) -> bytes:
        return bytes.fromhex(fingerprint(self.model))

    def _dtype(self) -> str:
        name = str(next(iter(parameters_of(self.model).values())).dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise CodecError(f"expected a model of dtype {', '.join(DTYPES)}, got {name}. Load it as float32.")
        return name


def _pieces(text: str) -> list[str]:
    """A long text cut after line ends: a tokenizer takes some 150 times the memory of what it is given."""
    pieces = []
    while len(text) > _LONGEST_PIECE:
        end = text.rfind("\n", 0, _LONGEST_PIECE) + 1 or _LONGEST_PIECE
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def _as_bytes(data: bytes | str) -> bytes:
    if isinstance(data, str):
        try:
            return data.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CodecError(f"expected Unicode text, got a lone surrogate at character {error.start}. Pass the bytes.") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        raise CodecError(f"expected bytes or a text, got {type(data).__name__}.")
    return bytes(data)


def _environment(model: HookedModel) -> str:
    """What the last digits of a model's numbers depend on: versions (of `_PACKAGES`, in this order), processor, device."""
    versions = [version(name) for name in _PACKAGES]
    return " ".join([*versions, torch.backends.cpu.get_cpu_capability(), device_of(model).type])


assert METHODS[2:] == ("direct", "ranks")
