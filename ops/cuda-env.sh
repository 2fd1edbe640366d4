#!/bin/sh
# What `cargo build --features cuda` needs on a Linux machine (x86-64) without CUDA's toolkit: its
# compiler, headers and libraries, from PyPI, in a folder of this checkout. No GPU, no driver and no
# root are needed to build; to run, the driver of a GPU.
#
#   eval "$(sh ops/cuda-env.sh [FOLDER])"     # FOLDER: .cuda where none is named; 1.3 GB
#   cargo build --release --features cuda
#
# With HEARTH_NCCL=1 it brings NCCL too (0.3 GB), which `--features nccl` (several GPUs) links; to run
# such a build, LD_LIBRARY_PATH names `$CUDA_HOME/lib` or wherever else libnccl.so.2 is.
#
# Asks for python3 with pip, and for a C compiler that nvcc takes (gcc up to 15). Running it again
# is cheap. It prints the variables of the build on stdout and nothing else. Another folder, or
# another HEARTH_CUDA_CAP (90: H100 and H200), compiles every kernel again.
set -eu

folder=${1:-$(dirname "$0")/../.cuda}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
root=$folder/nvidia/cu13

# CUDA 13.0 update 2: compiler and its parts, then what is linked.
packages="
    nvidia-cuda-nvcc==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-nvrtc==13.0.88
    nvidia-cublas==13.1.0.3
    nvidia-curand==10.4.0.35"
if [ "$packages" != "$(cat "$folder/packages" 2>/dev/null)" ]; then
    # shellcheck disable=SC2086 # one word for each package
    python3 -m pip install --quiet --no-deps --no-compile --upgrade --target "$folder" $packages >&2
    echo "$packages" >"$folder/packages"
fi

# In a folder of its own: pip would put its `nvidia` in the place of the other.
nccl=nvidia-nccl-cu13==2.30.7
if [ "${HEARTH_NCCL:-0}" != 0 ] && [ "$nccl" != "$(cat "$folder/nccl/package" 2>/dev/null)" ]; then
    python3 -m pip install --quiet --no-deps --no-compile --upgrade --target "$folder/nccl" $nccl >&2
    ln -sf "$folder/nccl/nvidia/nccl/lib/libnccl.so.2" "$root/lib/libnccl.so.2"
    echo "$nccl" >"$folder/nccl/package"
fi

# A linker asks for libX.so; the packages bring libX.so.13 alone.
for numbered in "$root"/lib/lib*.so.[0-9]*; do
    name=${numbered##*/}
    ln -sf "$name" "$root/lib/${name%%.so.*}.so"
done

# libcuda.so comes with a driver. To link without one, an empty function for every name that its
# header declares will do; the loader must never find this folder.
stubs=$root/lib/stubs
if [ ! -e "$stubs/libcuda.so" ]; then
    mkdir -p "$stubs"
    grep -oE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+)?(_ptsz|_ptds)?\b' "$root/include/cuda.h" |
        sort -u |
        while read -r name; do echo "void $name(void) {}"; done >"$stubs/names.c"
    "${CC:-cc}" -w -shared -fPIC -Wl,-soname,libcuda.so.1 "$stubs/names.c" -o "$stubs/libcuda.so"
fi

# Where the build scripts look, for which device, with how many nvcc at once; code is stored
# compressed, which halves the program.
echo "export CUDA_HOME='$root'"
echo "export CUDA_COMPUTE_CAP='${HEARTH_CUDA_CAP:-90}'"
echo "export CUDAFORGE_THREADS='$(nproc)'"
echo "export NVCC_APPEND_FLAGS='--compress-mode=size'"
echo "export PATH=\"\$CUDA_HOME/bin:\$PATH\""
