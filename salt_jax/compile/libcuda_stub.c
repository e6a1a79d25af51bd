/* A CUDA driver without a device, so that cuDNN's libraries load and plan for a GPU that is only described.
   Every call they make of a driver fails as it would on a machine without a GPU. */
enum { NO_DEVICE = 100, VERSION = 13000 };

#define ABSENT(name) \
    int name(void) { return NO_DEVICE; }

ABSENT(cuInit)
ABSENT(cuDeviceGet)
ABSENT(cuGetProcAddress)
ABSENT(cuGetProcAddress_v2)
ABSENT(cuCtxGetCurrent)
ABSENT(cuCtxGetLimit)
ABSENT(cuCtxPopCurrent)
ABSENT(cuCtxPushCurrent)
ABSENT(cuStreamGetCtx)
ABSENT(cuModuleLoadData)
ABSENT(cuModuleGetFunction)
ABSENT(cuModuleUnload)
ABSENT(cuLibraryLoadData)
ABSENT(cuLibraryLoadFromFile)
ABSENT(cuLibraryGetKernel)
ABSENT(cuLibraryUnload)
ABSENT(cuKernelGetAttribute)
ABSENT(cuKernelGetFunction)
ABSENT(cuKernelSetAttribute)
ABSENT(cuLinkCreate)
ABSENT(cuLinkAddData)
ABSENT(cuLinkComplete)
ABSENT(cuLinkDestroy)
ABSENT(cuLaunchKernel)
ABSENT(cuLaunchKernelEx)
ABSENT(cuLaunchCooperativeKernel)
ABSENT(cuOccupancyMaxPotentialClusterSize)
ABSENT(cuTensorMapEncodeIm2col)
ABSENT(cuTensorMapEncodeTiled)

int cuDriverGetVersion(int *version) { return *version = VERSION, 0; }
int cuDeviceGetCount(int *count) { return *count = 0, 0; }
int cuGetErrorName(int error, const char **text) { return *text = "CUDA_ERROR_NO_DEVICE", 0; }
int cuGetErrorString(int error, const char **text) { return *text = "this driver has no device", 0; }
