/* NVIDIA's management library (libnvidia-ml.so.1) for the devices of driver.c. Each has used 7 bytes, and is
   busy for 40 % of the time; the last one is a slice of a device (MIG), which tells its memory only. */
#include <stdlib.h>
#include <string.h>

static int devices(void) {
  const char *value = getenv("FAKE_CUDA_DEVICES");
  return value ? atoi(value) : 1;
}

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  return 0;
}

int nvmlInit_v2(void) { return 0; }

int nvmlShutdown(void) { return 0; }

const char *nvmlErrorString(int code) {
  (void)code;
  return "not supported";
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  long index = strtol(uuid + strlen(uuid) - 2, NULL, 16);
  if (index >= devices()) return 6; /* NVML_ERROR_NOT_FOUND */
  *handle = (void *)(index + 1);
  return 0;
}

struct memory {
  unsigned long long total, free, used;
};

int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
  (void)handle;
  memory->total = 16, memory->free = 9, memory->used = 7;
  return 0;
}

struct utilization {
  unsigned gpu, memory;
};

int nvmlDeviceGetUtilizationRates(void *handle, struct utilization *rates) {
  if ((long)handle == devices()) return 3; /* NVML_ERROR_NOT_SUPPORTED */
  rates->gpu = 40, rates->memory = 10;
  return 0;
}
