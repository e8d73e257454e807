/* libcuda.so.1 without a GPU, beside runtime.c: what torch and Triton ask a driver for. 0 is
   CUDA_SUCCESS. Attributes are by their numbers in cuda.h. */
typedef int Result;

static char handle[64];

static int attribute(int number) {
    switch (number) {
    case 8: return 49152;   /* shared memory of a block, bytes */
    case 10: return 32;     /* warp */
    case 12: return 65536;  /* registers of a block */
    case 16: return 132;    /* multiprocessors */
    case 75: return 9;      /* compute capability, major */
    case 76: return 0;      /* and minor */
    case 81: return 233472; /* shared memory of a multiprocessor */
    case 82: return 65536;  /* registers of a multiprocessor */
    case 97: return 232448; /* shared memory of a block that opts in */
    default: return 1;
    }
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "fake"; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetAttribute(int *value, int number, int device) { *value = attribute(number); return 0; }
Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = handle; return 0; }
Result cuCtxGetCurrent(void **context) { *context = 0; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(void) { return 0; }
Result cuCtxSetLimit(void) { return 0; }
Result cuModuleLoad(void **module, const char *file) { *module = handle; return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = handle; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = handle; return 0; }
Result cuFuncGetAttribute(int *value, int number, void *function) { *value = number == 4 ? 64 : 0; return 0; }
Result cuFuncSetAttribute(void *function, int number, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuLaunchKernel(void) { return 0; }
Result cuLaunchKernelEx(void *config, void *function, void **parameters, void **extra) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
Result cuPointerGetAttribute(void *data, int number, unsigned long pointer) { return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
