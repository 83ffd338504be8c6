/* A CUDA driver (libcuda.so.1) without a GPU: as many devices as FAKE_CUDA_DEVICES says, of a driver for the
   CUDA version FAKE_CUDA_VERSION (12040 is 12.4). FAKE_CUDA_INIT is what cuInit returns. Host memory is
   ordinary memory. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value ? atoi(value) : otherwise;
}

int cuInit(unsigned flags) {
  (void)flags;
  return number("FAKE_CUDA_INIT", 0);
}

int cuDriverGetVersion(int *version) {
  *version = number("FAKE_CUDA_VERSION", 13000);
  return 0;
}

int cuDeviceGetCount(int *count) {
  *count = number("FAKE_CUDA_DEVICES", 1);
  return 0;
}

int cuDeviceGet(int *device, int index) {
  *device = index;
  return index < number("FAKE_CUDA_DEVICES", 1) ? 0 : 101; /* CUDA_ERROR_INVALID_DEVICE */
}

/* 00000000-0000-0000-0000-0000000000NN, where NN is the device's number. */
int cuDeviceGetUuid(char uuid[16], int device) {
  memset(uuid, 0, 16);
  uuid[15] = (char)device;
  return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = (void *)(size_t)(device + 1);
  return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  (void)device;
  return 0;
}

int cuCtxPushCurrent_v2(void *context) {
  (void)context;
  return 0;
}

int cuCtxPopCurrent_v2(void **context) {
  *context = NULL;
  return 0;
}

int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
  (void)flags;
  *address = malloc(size);
  return *address ? 0 : 2; /* CUDA_ERROR_OUT_OF_MEMORY */
}

int cuMemFreeHost(void *address) {
  free(address);
  return 0;
}

/* ONNX Runtime's CUDA provider is linked to it. */
int cuTensorMapEncodeTiled(void) { return 801; /* CUDA_ERROR_NOT_SUPPORTED */ }
