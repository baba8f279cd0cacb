"""What pyproject.toml cannot describe: the folder kernels/ as llmfast.kernels, and the native libraries of csrc/.

The libraries need a C++ compiler, and nvcc for the CUDA one, but not torch: they speak its stable C ABI. What cannot be
built is left out with a reason in llmfast/native/build.json, which `llmfast doctor` shows. Environment variables:

    LLMFAST_STRICT=1        a library that cannot be built is an error
    LLMFAST_CUDA=0          do not build the CUDA library; 1: fetch nvcc for it even if no GPU is visible
    LLMFAST_CUDA_ARCHS      what to compile for, "80;90a" by default
    CXX, CUDA_HOME          the compiler, and the toolkit's folder
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
source_hash = runpy.run_path(str(ROOT / "llmfast/native/sources.py"))["source_hash"]

# No -ffast-math, at link least of all: it would flush denormals to zero in the whole process.
CXX_FLAGS = "-O2 -g0 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"
UNROLLING = "-O3 -fno-gcse-after-reload -fno-tree-partial-pre"  # but for passes that cost time and win none here
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden"
# The instruction sets that the CPU kernels are compiled for; one is chosen at run time.
VARIANTS = {"baseline": ""}
if sysconfig.get_platform().endswith("x86_64"):
    VARIANTS |= {
        "avx2": "-mavx2 -mfma",
        "avx512": "-march=x86-64-v4",
        "avx512_bf16": "-march=x86-64-v4 -mavx512bf16",
    }


class Unavailable(Exception):
    """Why a library cannot be built here, and what would help."""


def cuda_wanted() -> str:
    return os.environ.get("LLMFAST_CUDA", "auto")


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the path, of the usual folder, or of the wheels that pip has fetched for this build."""
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    folders += [Path(on_path).parent] if on_path else []
    folders += [Path("/usr/local/cuda/bin")]
    folders += [found for entry in sys.path for found in Path(entry or ".").glob("nvidia/cu*/bin")]
    return next((folder / "nvcc" for folder in folders if (folder / "nvcc").is_file()), None)


def build_requirements() -> list[str]:
    """The toolkit as wheels, where there is a GPU to compile for and no nvcc. Plain nvidia-cuda-nvcc is not enough: its
    ptxas and its libnvvm may be of different versions."""
    gpu = Path("/dev/nvidiactl").exists() or cuda_wanted() == "1"
    return ["cuda-toolkit[nvcc,cudart,cccl]==13.0.*"] if gpu and cuda_wanted() != "0" and find_nvcc() is None else []


def toolkit_libraries(nvcc: Path) -> Path:
    """The folder of libcudart_static.a, by what nvcc itself calls its home (the one on the path may be a script)."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    home = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    top = Path(home[1].strip()) if home else nvcc.resolve().parents[1]
    for folder in (top / "lib64", top / "lib", *top.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return folder
    raise Unavailable(f"{nvcc} has no libcudart_static.a beside it; install the CUDA toolkit's cudart")


def ninja_file(name: str, folder: Path, compiler: str) -> str:
    """Rules that make `folder`/_<name>.so, which needs nothing of torch but the name libtorch.so, of a stub."""
    define = f"""'-DLLMFAST_SOURCE_HASH="{source_hash(CSRC, name)}"'"""
    cxx = f"{compiler} {CXX_FLAGS} $flags -I{CSRC} -MMD -MF $out.d -c $in -o $out"
    lines = [
        f"builddir = {folder}",
        f"rule cxx\n command = {cxx}\n depfile = $out.d",
        f"rule stub\n command = {compiler} -shared -x c++ /dev/null -Wl,-soname,libtorch.so -o $out",
        f"rule link\n command = {compiler} -shared $objects -o $out -Wl,--no-as-needed $stub -Wl,--as-needed $libs",
        f"build {folder}/libtorch.so: stub",
    ]
    objects: list[str] = []

    def compile(rule: str, source: Path, flags: str, suffix: str = "") -> None:
        objects.append(f"{folder}/{name}-{source.stem}{suffix}.o")
        lines.append(f"build {objects[-1]}: {rule} {source}\n flags = {flags}")

    libs = ""
    if name == "cpu":
        for variant, flags in reversed(VARIANTS.items()):  # what takes longest first
            flags = f"-DLLMFAST_VARIANT={variant} {flags}"
            if variant != "avx512_bf16":  # its other kernels are avx512's; -O3 unrolls loops over a few rows
                compile("cxx", CSRC / "cpu/variant.cpp", f"{UNROLLING} {flags}", f"-{variant}")
            compile("cxx", CSRC / "cpu/attention_variant.cpp", flags, f"-{variant}")
    else:
        nvcc = find_nvcc()
        assert nvcc is not None
        libs = f"-L{toolkit_libraries(nvcc)} -lcudart_static -ldl -lpthread -lrt"
        archs = re.split("[;, ]+", os.environ.get("LLMFAST_CUDA_ARCHS") or "80;90a")
        if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
            raise Unavailable(f"LLMFAST_CUDA_ARCHS is {';'.join(archs)!r}; give numbers as in 80;90a")
        codes = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
        command = f"{nvcc} -ccbin {compiler} {NVCC_FLAGS} {codes} -I{CSRC} -MD -MF $out.d -c $in -o $out"
        lines.append(f"rule nvcc\n command = {command}\n depfile = $out.d")
        for source in sorted((CSRC / name).glob("*.cu")):
            compile("nvcc", source, "")
    for source in sorted((CSRC / name).glob("*.cpp")):
        if not source.stem.endswith("variant"):
            compile("cxx", source, define)
    lines.append(f"build {folder}/_{name}.so: link {' '.join(objects)} | {folder}/libtorch.so")
    lines.append(f" objects = {' '.join(objects)}\n stub = {folder}/libtorch.so\n libs = {libs}\n")
    return "\n".join(lines)


def build(name: str, folder: Path) -> Path:
    """Compile one library; raises Unavailable."""
    if sys.platform != "linux":
        raise Unavailable(f"the native libraries are built on Linux only, not on {sys.platform}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        raise Unavailable(f"no C++ compiler ({compiler or 'g++'} is not on the path); install g++")
    if name == "cuda" and cuda_wanted() == "0":
        raise Unavailable("LLMFAST_CUDA=0 was set; unset it")
    if name == "cuda" and find_nvcc() is None:
        raise Unavailable("no nvcc and no visible GPU; install the CUDA toolkit, or set LLMFAST_CUDA=1 to fetch nvcc")
    try:
        from ninja import BIN_DIR

        ninja = str(Path(BIN_DIR, "ninja"))
    except ImportError:
        ninja = shutil.which("ninja") or ""
    if not ninja:
        raise Unavailable("no ninja; pip install ninja")
    folder.mkdir(parents=True, exist_ok=True)
    rules = folder / f"{name}.ninja"
    rules.write_text(ninja_file(name, folder, compiler))
    product = folder / f"_{name}.so"
    done = subprocess.run([ninja, "-f", rules, product], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0 or not product.exists():
        said = done.stdout.decode(errors="replace")
        print(said, file=sys.stderr)
        lines = [line.strip() for line in said.splitlines()] or ["it said nothing"]
        raise Unavailable(f"the compiler failed: {next((line for line in lines if 'error' in line), lines[-1])}")
    return product


class BuildNative(build_ext):
    """Builds the libraries with ninja, and writes beside them what was built and what was not, and why."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "llmfast/native"
        package.mkdir(parents=True, exist_ok=True)
        record = {}
        for name in ("cpu", "cuda"):
            target, start = package / f"_{name}.so", time.monotonic()
            target.unlink(missing_ok=True)  # not written over: a process that has the old library open keeps it
            try:
                shutil.copy2(build(name, ROOT / "build/native"), target)
                record[name] = {"built": True, "seconds": round(time.monotonic() - start, 1)}
            except Unavailable as error:
                strict = os.environ.get("LLMFAST_STRICT", "0") not in ("", "0")
                if strict and not (name == "cuda" and cuda_wanted() == "0"):
                    raise SystemExit(f"llmfast: the {name} library was not built: {error}") from None
                print(f"llmfast: the {name} library was not built: {error}", file=sys.stderr)
                record[name] = {"built": False, "reason": str(error)}
        (package / "build.json").write_text(json.dumps(record, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib, "llmfast/native")
        return [str(file) for file in (*package.glob("_*.so"), package / "build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """The libraries use no function of Python's: one wheel a platform serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*") if p.suffix in (".cpp", ".cu"))
headers = sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".md"))
setup(
    packages=[*find_packages(include=["llmfast*"], exclude=["llmfast.kernels"]), "llmfast.kernels"],
    package_dir={"llmfast.kernels": "kernels"},
    setup_requires=build_requirements(),
    ext_modules=[Extension("llmfast.native._native", sources, depends=headers)],  # which sdist lists
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
