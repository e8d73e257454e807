/* A CUDA runtime without a GPU: one NVIDIA H200, on which nothing ever runs.

   Preloaded, it answers instead of libcudart, so that the CUDA build of torch starts. Device memory
   is the host's, copies are copies, kernels do nothing. Streams and events are addresses. */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define MEMORY 150754820096ull /* bytes; 140.4 GiB */
#define STUB(name, parameters, body)                                                               \
    cudaError_t name parameters {                                                                  \
        body;                                                                                      \
        return cudaSuccess;                                                                        \
    }
#define HANDLE(handle) *(handle) = malloc(64)

static __thread int current;

/* --- devices --- */
STUB(cudaGetDeviceCount, (int *count), *count = 1)
STUB(cudaGetDevice, (int *device), *device = current)
STUB(cudaSetDevice, (int device), current = device)
STUB(cudaDriverGetVersion, (int *version), *version = 13000)
STUB(cudaMemGetInfo, (size_t * free, size_t *total), *free = *total = MEMORY)
STUB(cudaDeviceCanAccessPeer, (int *can, int device, int peer), *can = 0)
STUB(cudaDeviceSynchronize, (void), )
STUB(cudaDeviceGetStreamPriorityRange, (int *least, int *greatest), *least = 0; *greatest = -5)
STUB(cudaDeviceGetAttribute, (int *value, enum cudaDeviceAttr attribute, int device),
     *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0)

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    /* "H200 Tensor Core GPU" data sheet; CUDA C++ programming guide, compute capability 9.0 */
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200");
    p->major = 9;
    p->totalGlobalMem = MEMORY;
    p->multiProcessorCount = 132;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 62914560;
    p->unifiedAddressing = 1;
    return cudaSuccess;
}

/* --- memory --- */
STUB(cudaMalloc, (void **data, size_t bytes), *data = calloc(1, bytes))
STUB(cudaFree, (void *data), free(data))
STUB(cudaHostAlloc, (void **data, size_t bytes, unsigned flags), *data = calloc(1, bytes))
STUB(cudaFreeHost, (void *data), free(data))
STUB(cudaMemcpy, (void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind),
     memcpy(to, from, bytes))
STUB(cudaMemcpyAsync,
     (void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream),
     memcpy(to, from, bytes))
STUB(cudaMemsetAsync, (void *data, int value, size_t bytes, cudaStream_t stream),
     memset(data, value, bytes))
STUB(cudaPointerGetAttributes, (struct cudaPointerAttributes * attributes, const void *data),
     memset(attributes, 0, sizeof *attributes))

/* --- streams and events --- */
STUB(cudaStreamCreateWithPriority, (cudaStream_t * stream, unsigned flags, int priority),
     HANDLE(stream))
STUB(cudaStreamCreateWithFlags, (cudaStream_t * stream, unsigned flags), HANDLE(stream))
STUB(cudaStreamDestroy, (cudaStream_t stream), )
STUB(cudaStreamQuery, (cudaStream_t stream), )
STUB(cudaStreamSynchronize, (cudaStream_t stream), )
STUB(cudaStreamWaitEvent, (cudaStream_t stream, cudaEvent_t event, unsigned flags), )
STUB(cudaStreamIsCapturing, (cudaStream_t stream, enum cudaStreamCaptureStatus *status),
     *status = cudaStreamCaptureStatusNone)
STUB(cudaStreamGetCaptureInfo,
     (cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
      cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
      size_t *count),
     *status = cudaStreamCaptureStatusNone; if (id) *id = 0; if (count) *count = 0)
STUB(cudaThreadExchangeStreamCaptureMode, (enum cudaStreamCaptureMode * mode), )
STUB(cudaEventCreate, (cudaEvent_t * event), HANDLE(event))
STUB(cudaEventCreateWithFlags, (cudaEvent_t * event, unsigned flags), HANDLE(event))
STUB(cudaEventDestroy, (cudaEvent_t event), free(event))
STUB(cudaEventRecord, (cudaEvent_t event, cudaStream_t stream), )
STUB(cudaEventRecordWithFlags, (cudaEvent_t event, cudaStream_t stream, unsigned flags), )
STUB(cudaEventQuery, (cudaEvent_t event), )
STUB(cudaEventSynchronize, (cudaEvent_t event), )
STUB(cudaEventElapsedTime, (float *milliseconds, cudaEvent_t from, cudaEvent_t to),
     *milliseconds = 1)

/* --- errors --- */
STUB(cudaGetLastError, (void), )
STUB(cudaPeekAtLastError, (void), )
