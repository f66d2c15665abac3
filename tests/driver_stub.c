// A libcuda.so.1 for machines without an NVIDIA driver: what Triton's launcher calls, on a chip like the H100.
//
// Nothing runs. A launch is counted if the driver would take it, and a tensor map is checked by the rules that
// cuTensorMapEncodeTiled states for it (CUDA driver API, "Tensor Map Object Management"): so the arguments that the
// launchers hand over are read by Triton's own code, and refused where a GPU would refuse them.

#include "cuda.h"
#include <stdio.h>
#include <string.h>

enum { SHARED = 227 << 10, THREADS = 1024, MULTIPROCESSORS = 132 };

static int context;  // its address is every handle
static int count, early;  // launches, and those that may begin before the one before has ended

int stub_launches(void) { return count; }
int stub_early(void) { return early; }

static CUresult refuse(const char *what, unsigned long long got) {
  fprintf(stderr, "driver stub: %s, got %llu\n", what, got);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "refused by the driver stub";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *primary, CUdevice device) { return cuCtxGetCurrent(primary); }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)&context;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)&context;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
  for (unsigned i = 0; i < n; i++) {
    if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
      *(CUdeviceptr *)data[i] = pointer;
    else
      *(int *)data[i] = 0;
  }
  return CUDA_SUCCESS;
}

static unsigned bytes_of(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
  case CU_TENSOR_MAP_DATA_TYPE_UINT64:
  case CU_TENSOR_MAP_DATA_TYPE_INT64:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
  default: return 4;
  }
}

static unsigned bytes_of_swizzle(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
  case CU_TENSOR_MAP_SWIZZLE_NONE: return 256 * 8;  // as the box itself is limited
  case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
  case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
  default: return 128;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  if (rank < 1 || rank > 5)
    return refuse("rank must lie between 1 and 5", rank);
  if ((unsigned long long)address % 16)
    return refuse("address must be a multiple of 16", (unsigned long long)address);
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32)
      return refuse("size must lie between 1 and 2^32", sizes[i]);
    if (box[i] < 1 || box[i] > 256)
      return refuse("box must lie between 1 and 256", box[i]);
    if (steps[i] < 1 || steps[i] > 8)
      return refuse("step must lie between 1 and 8", steps[i]);
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
      return refuse("stride must be a multiple of 16 below 2^40", strides[i]);
  }
  unsigned inner = box[0] * bytes_of(type);
  if (inner % 16 || inner > bytes_of_swizzle(swizzle))
    return refuse("a row of the box must be a multiple of 16 bytes, no longer than the swizzle", inner);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (config->gridDimX < 1 || config->gridDimX > 0x7fffffff)
    return refuse("the grid's first axis must lie between 1 and 2^31 - 1", config->gridDimX);
  if (config->gridDimY < 1 || config->gridDimY > 65535)
    return refuse("the grid's second axis must lie between 1 and 65535", config->gridDimY);
  if (config->gridDimZ < 1 || config->gridDimZ > 65535)
    return refuse("the grid's third axis must lie between 1 and 65535", config->gridDimZ);
  if (config->blockDimX * config->blockDimY * config->blockDimZ > THREADS)
    return refuse("a program must have 1024 threads at most", config->blockDimX);
  if (config->sharedMemBytes > SHARED)
    return refuse("a program must have 227 KiB of shared memory at most", config->sharedMemBytes);
  count++;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      early += config->attrs[i].value.programmaticStreamSerializationAllowed == 1;
  return CUDA_SUCCESS;
}
