#!/usr/bin/env bash
# Runs Python with the CUDA build of torch on a GPU that is not there: run.sh PYTHON [ARGUMENT...]
# It proves what is traced, compiled and allocated, and nothing about numerics, NCCL or speed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
include=$("$1" -c 'import glob, os, sysconfig
headers = glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/include/cuda_runtime_api.h")
print(*map(os.path.dirname, headers[:1]))')
[ -n "$include" ] || { echo "$1 has no CUDA build of torch" >&2; exit 3; }
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir -p "$build/crt"
# the wheel's headers include this one of nvcc's, which it lacks
for name in __host__ __device__ __global__ __shared__ __constant__ __managed__ CUDARTAPI CUDART_CB \
  CUDARTAPI_CDECL __device_builtin__ __device_builtin_texture_type__ __device_builtin_surface_type__ \
  __cudart_builtin__ __CUDA_DEPRECATED; do echo "#define $name"; done > "$build/crt/host_defines.h"
cat >> "$build/crt/host_defines.h" <<'HEADER'
#define __forceinline__ inline
#define __location__(place)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_align__(bytes) __align__(bytes)
HEADER
${CC:-gcc} -shared -fPIC -w -I"$build" -I"$include" "$here/runtime.c" -o "$build/libfake_runtime.so"
${CC:-gcc} -shared -fPIC -w "$here/driver.c" -o "$build/libcuda.so.1"
ln -s libcuda.so.1 "$build/libcuda.so"
LD_PRELOAD="$build/libfake_runtime.so" LD_LIBRARY_PATH="$build" TRITON_LIBCUDA_PATH="$build" "$@"
