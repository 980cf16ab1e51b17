"""llama.cpp's own programs, as subprocesses: the quantizer, and the tool that measures the KL between two files.

Built for a CPU out of the source package of llama-cpp-python, which holds all of llama.cpp (some 15 minutes of one
core; the programs are then in build/bin):

    pip install cmake ninja
    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cmake -G Ninja -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
    ninja -C build llama-quantize llama-perplexity llama-imatrix
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DIRECTORY_VARIABLE = "LLAMA_CPP_BIN"
CONTEXT_TOKENS = 512
_KL = re.compile(r"Mean\s+KLD:\s+(\S+)\s+±\s+(\S+)")


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Where the programs are.

    Args:
        quantize: Path of llama-quantize.
        perplexity: Path of llama-perplexity.
    """

    quantize: str
    perplexity: str

    @classmethod
    def find(cls, directory: Path | None) -> "Tools":
        """Returns the programs of a directory, of that which ``LLAMA_CPP_BIN`` names, or of the path.

        Raises:
            FileNotFoundError: If one of them is in none of these.
        """
        places = [directory, os.environ.get(DIRECTORY_VARIABLE)]
        path = os.pathsep.join([*(str(place) for place in places if place), os.environ.get("PATH", "")])
        found = {name: shutil.which(f"llama-{name}", path=path) for name in ("quantize", "perplexity")}
        missing = [f"llama-{name}" for name, where in found.items() if where is None]
        if missing:
            msg = (
                f"llama.cpp's programs must be found: got no {', '.join(missing)} in '{path}'. Build them as "
                f"{__file__} says, and name their directory with --tools or {DIRECTORY_VARIABLE}."
            )
            raise FileNotFoundError(msg)
        return cls(quantize=str(found["quantize"]), perplexity=str(found["perplexity"]))

    def make_mix(self, reference: Path, out: Path, mix: str, imatrix: Path | None) -> None:
        """Writes llama.cpp's own mix of an unquantized file."""
        weighted = [] if imatrix is None else ["--imatrix", str(imatrix)]
        _run(self.quantize, *weighted, str(reference), str(out), mix, "1")

    def write_base(self, reference: Path, text: Path, base: Path, chunks: int) -> None:
        """Writes the logits of a file on a text, which others are compared with."""
        options = ["-c", str(CONTEXT_TOKENS), "--chunks", str(chunks), "-t", "1"]
        _run(self.perplexity, "-m", str(reference), "-f", str(text), "--kl-divergence-base", str(base), *options)

    def measure_kl(self, path: Path, base: Path) -> tuple[float, float]:
        """Returns the mean KL of a file to the base's logits, nats per token, and its standard error."""
        options = ["-c", str(CONTEXT_TOKENS), "-t", "1"]
        text = _run(self.perplexity, "-m", str(path), "--kl-divergence-base", str(base), "--kl-divergence", *options)
        found = _KL.search(text)
        assert found is not None, f"llama-perplexity prints the mean KLD: got {text[-500:]!r}"
        return float(found[1]), float(found[2])


def _run(*command: str) -> str:
    """Returns what a program prints."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode:
        msg = f"{' '.join(command)} must succeed: got exit status {done.returncode}.\n{done.stderr[-2000:]}"
        raise RuntimeError(msg)
    return done.stdout + done.stderr
