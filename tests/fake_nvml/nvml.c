/* A fake NVIDIA driver library (libnvidia-ml.so.1) whose answers come from a small text file.
 *
 * The real pynvml runs on it unchanged. FAKE_NVML_STATE names the file, which is read again whenever it was replaced:
 * a test can break a GPU while the process under test runs. build.py compiles this and writes the file.
 * Functions that are not here are absent, as in an old driver: pynvml then raises NVMLError_FunctionNotFound.
 *
 * A line is key=value: "3.temperature=91" is of GPU 3, "driver_version=570.124.06" of the node. What the file does not
 * say is as on a healthy, idle H200. A value "!15" makes the calls that read it return that NVML error. Special keys:
 *
 *   init            of the node: what nvmlInit returns (9: the driver is not loaded)
 *   dies_at         of the node: the process ends (SIGABRT) in this call, counted from 1; the calls of all functions count
 *   hangs_at        of the node: this call never returns
 *   chatters        of the node: every call writes to standard output, without a line break at its end
 *   error           of a GPU: every call on it returns this error (15: it has fallen off the bus)
 *   hang_until      of a GPU or the node: calls do not return before this Unix time ("inf": never)
 *   field_<id>      of a GPU: the answer of nvmlDeviceGetFieldValues; NOT_SUPPORTED without it
 *   retired_<cause> of a GPU: how many pages; NOT_SUPPORTED without it, as on GPUs that remap rows instead
 *   processes       of a GPU: "pid:bytes pid:bytes"
 *   nvlinks         of a GPU: how many of its links exist (0: a card without NVLink)
 *   nvlink_<n>      of a GPU: 0 where that link is down
 *   field_82        of a GPU: the temperature of its memory
 *   fabric_state    of a GPU: 0 it has no fabric, 1 not started, 2 in progress, 3 completed; fabric_status, fabric_health
 *   event_<n>       of the node, n = 1, 2, …: "gpu type data", delivered once to each event set older than it
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* The ABI, as in nvml.h and pynvml.py. */
enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7,
    TIMEOUT = 10, GPU_IS_LOST = 15, VERSION_MISMATCH = 25,
};
enum { FIELD_RECOVERY_ACTION = 230, TYPE_UINT = 1, TYPE_ULONGLONG = 3, EVENT_ECC = 0x3, EVENT_XID = 0x8 };

typedef int Return;
typedef unsigned int uint;
typedef unsigned long long u64;
typedef struct { int opaque; } Device;
typedef struct { char legacy[16]; uint domain, bus, device, device_id, subsystem_id; char bus_id[32]; } PciInfo;
typedef struct { u64 total, free, used; } Memory;
typedef struct { uint version; u64 total, reserved, free, used; } MemoryV2;
typedef struct { uint version, sensor; int temperature; } TemperatureV1;
typedef struct { uint gpu, memory; } Utilization;
typedef struct { uint pid; u64 used; uint gpu_instance, compute_instance; } Process;
typedef struct { uint id, scope; long long timestamp, latency; uint type; Return result; u64 value; } FieldValue;
typedef struct { Device *device; u64 type, data; uint gpu_instance, compute_instance; } EventData;
typedef struct {
    uint version;
    u64 aggregate_parity, aggregate_secded, aggregate_corrected;
    u64 volatile_parity, volatile_secded, volatile_corrected;
    u64 buckets[5];
    uint threshold_exceeded;
} SramEcc;
typedef struct {
    uint version;
    unsigned char cluster[16];
    Return status;
    uint clique;
    unsigned char state;
    uint health;
} FabricInfo;
#define VERSION(type, number) (sizeof(type) | (number) << 24)

#define TRY(call) do { Return result_ = (call); if (result_ != SUCCESS) return result_; } while (0)

/* The state file. */
enum { MAX_GPUS = 32, MAX_LINES = 1024, WIDTH = 128, ABSENT = -1 };
#define NODE NULL

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char keys[MAX_LINES][WIDTH], values[MAX_LINES][WIDTH];
static int lines;
static struct stat seen;
static Device devices[MAX_GPUS];
static int initialized;

static void reload(void) {
    struct stat now;
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file == NULL || fstat(fileno(file), &now) != 0) {
        fprintf(stderr, "fake NVML: FAKE_NVML_STATE names no readable file: %s\n", path ? path : "it is not set");
        abort();
    }
    if (now.st_ino != seen.st_ino || now.st_size != seen.st_size || now.st_mtim.tv_sec != seen.st_mtim.tv_sec ||
        now.st_mtim.tv_nsec != seen.st_mtim.tv_nsec) {
        for (lines = 0; lines < MAX_LINES && fscanf(file, " %127[^=]=%127[^\n]", keys[lines], values[lines]) == 2;)
            lines++;
        seen = now;
    }
    fclose(file);
}

/* Whether the file has this key of that GPU or of the node, and its value. */
static int look_up(const Device *device, const char *key, char value[WIDTH]) {
    char full[WIDTH];
    int line = 0;
    if (device == NODE)
        snprintf(full, sizeof full, "%s", key);
    else
        snprintf(full, sizeof full, "%d.%s", (int)(device - devices), key);
    pthread_mutex_lock(&lock);
    reload();
    while (line < lines && strcmp(keys[line], full) != 0)
        line++;
    if (line < lines)
        strcpy(value, values[line]);
    pthread_mutex_unlock(&lock);
    return line < lines;
}

static Return number_in_file(const Device *device, const char *key, long long fallback, u64 *out) {
    char value[WIDTH];
    *out = fallback == ABSENT ? 0 : (u64)fallback;
    if (!look_up(device, key, value))
        return fallback == ABSENT ? NOT_SUPPORTED : SUCCESS;
    if (value[0] == '!')
        return atoi(value + 1);
    *out = strtoull(value, NULL, 0);
    return SUCCESS;
}

static double now(clockid_t clock) {
    struct timespec at;
    clock_gettime(clock, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static void doze(void) { nanosleep(&(struct timespec){.tv_nsec = 10 * 1000 * 1000}, NULL); }

static void wait_while_hung(const Device *device) {
    char until[WIDTH];
    while (look_up(device, "hang_until", until) && now(CLOCK_REALTIME) < strtod(until, NULL))
        doze();
}

/* What a broken library does to its process, at any call. */
static void misbehave(void) {
    static int calls;
    char value[WIDTH];
    int call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (look_up(NODE, "chatters", value)) {
        printf("NVML: call %d\n{\"nvml\": \"ok\", ", call);
        fflush(stdout);
    }
    if (look_up(NODE, "dies_at", value) && atoi(value) == call)
        abort();
    while (look_up(NODE, "hangs_at", value) && atoi(value) == call)
        doze();
}

/* Every call begins so: is the library initialized and the GPU there, does it hang, is it lost? */
static Return enter(const Device *device) {
    u64 count, error = SUCCESS;
    misbehave();
    if (!initialized)
        return UNINITIALIZED;
    TRY(number_in_file(NODE, "gpus", 8, &count));
    if (device != NODE && (device < devices || device >= devices + (count < MAX_GPUS ? count : MAX_GPUS)))
        return INVALID_ARGUMENT;
    wait_while_hung(device);
    if (device != NODE)
        TRY(number_in_file(device, "error", SUCCESS, &error));
    return (Return)error;
}

static Return get_u64(const Device *device, const char *key, long long fallback, u64 *out) {
    TRY(enter(device));
    return number_in_file(device, key, fallback, out);
}

static Return get_uint(const Device *device, const char *key, long long fallback, uint *out) {
    u64 value;
    TRY(get_u64(device, key, fallback, &value));
    *out = (uint)value;
    return SUCCESS;
}

/* A text; "%x" in the fallback is the GPU's index. */
static Return get_text(const Device *device, const char *key, const char *fallback, char *out, uint size) {
    char value[WIDTH];
    TRY(enter(device));
    if (!look_up(device, key, value))
        snprintf(value, sizeof value, fallback, device == NODE ? 0 : (uint)(device - devices));
    if (value[0] == '!')
        return atoi(value + 1);
    if (strlen(value) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return SUCCESS;
}

#define UINT(function, key, fallback) \
    Return function(Device *device, uint *out) { return get_uint(device, key, fallback, out); }
#define U64(function, key, fallback) \
    Return function(Device *device, u64 *out) { return get_u64(device, key, fallback, out); }
#define TEXT(function, key, fallback) \
    Return function(Device *device, char *out, uint size) { return get_text(device, key, fallback, out, size); }
#define NODE_TEXT(function, key, fallback) \
    Return function(char *out, uint size) { return get_text(NODE, key, fallback, out, size); }

/* What is asked without arguments of its own. */
UINT(nvmlDeviceGetIndex, "index", device - devices)
UINT(nvmlDeviceGetPowerUsage, "power", 75000)
UINT(nvmlDeviceGetEnforcedPowerLimit, "power_limit", 700000)
UINT(nvmlDeviceGetPersistenceMode, "persistence_mode", 1)
UINT(nvmlDeviceGetCurrPcieLinkWidth, "pcie_width", 16)
UINT(nvmlDeviceGetMaxPcieLinkWidth, "pcie_width_max", 16)
UINT(nvmlDeviceGetCurrPcieLinkGeneration, "pcie_generation", 5)
UINT(nvmlDeviceGetMaxPcieLinkGeneration, "pcie_generation_max", 5)
UINT(nvmlDeviceGetPcieReplayCounter, "pcie_replays", 0)
UINT(nvmlDeviceGetRetiredPagesPendingStatus, "retired_pending", ABSENT)
U64(nvmlDeviceGetCurrentClocksEventReasons, "clocks_event_reasons", 0x1)
U64(nvmlDeviceGetCurrentClocksThrottleReasons, "clocks_event_reasons", 0x1) /* its name before driver 535 */
U64(nvmlDeviceGetTotalEnergyConsumption, "energy", 1000000) /* mJ */
U64(nvmlDeviceGetSupportedEventTypes, "event_types", EVENT_XID | EVENT_ECC)
TEXT(nvmlDeviceGetName, "name", "NVIDIA H200")
TEXT(nvmlDeviceGetUUID, "uuid", "GPU-00000000-0000-0000-0000-0000000000%02x")
TEXT(nvmlDeviceGetSerial, "serial", "16501230000%02x")
TEXT(nvmlDeviceGetVbiosVersion, "vbios_version", "96.00.A0.00.01")
TEXT(nvmlDeviceGetInforomImageVersion, "inforom_version", "G525.0225.00.05")
NODE_TEXT(nvmlSystemGetDriverVersion, "driver_version", "570.124.06")
NODE_TEXT(nvmlSystemGetNVMLVersion, "nvml_version", "12.570.124.06")

/* The library, and finding GPUs. */
Return nvmlInitWithFlags(uint flags) {
    u64 result;
    (void)flags;
    misbehave();
    wait_while_hung(NODE);
    TRY(number_in_file(NODE, "init", SUCCESS, &result));
    initialized += result == SUCCESS;
    return (Return)result;
}

Return nvmlShutdown(void) {
    if (!initialized)
        return UNINITIALIZED;
    initialized--;
    return SUCCESS;
}

const char *nvmlErrorString(Return result) {
    static const char *const strings[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions",
        "Already Initialized", "Not Found", "Insufficient Size", "Insufficient External Power", "Driver Not Loaded",
        "Timeout", "Interrupt Request Issue", "NVML Shared Library Not Found", "Function Not Found",
        "Corrupted infoROM", "GPU is lost", "GPU requires reset", "Operating System call failed",
        "Driver/library version mismatch",
    };
    return result >= 0 && (size_t)result < sizeof strings / sizeof *strings ? strings[result] : "Unknown Error";
}

Return nvmlDeviceGetCount_v2(uint *count) { return get_uint(NODE, "gpus", 8, count); }

Return nvmlDeviceGetHandleByIndex_v2(uint index, Device **device) {
    return enter(*device = devices + (index < MAX_GPUS ? index : MAX_GPUS));
}

Return nvmlDeviceGetPciInfo_v3(Device *device, PciInfo *info) {
    memset(info, 0, sizeof *info);
    TRY(get_uint(device, "pci_bus", 0x1b + 0x10 * (device - devices), &info->bus));
    info->device_id = 0x233510de;
    snprintf(info->legacy, sizeof info->legacy, "0000:%02X:00.0", info->bus & 0xff);
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", info->bus & 0xff);
    return SUCCESS;
}

/* Load and temperature. */
Return nvmlDeviceGetUtilizationRates(Device *device, Utilization *out) {
    TRY(get_uint(device, "utilization_gpu", 0, &out->gpu));
    return get_uint(device, "utilization_memory", 0, &out->memory);
}

Return nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *out) {
    if (out->version != VERSION(MemoryV2, 2))
        return VERSION_MISMATCH;
    TRY(get_u64(device, "memory_total", 150754820096, &out->total));
    TRY(get_u64(device, "memory_reserved", 653787136, &out->reserved));
    TRY(get_u64(device, "memory_used", 0, &out->used));
    out->free = out->total - out->reserved - out->used;
    return SUCCESS;
}

Return nvmlDeviceGetMemoryInfo(Device *device, Memory *out) {
    MemoryV2 memory = {.version = VERSION(MemoryV2, 2)};
    TRY(nvmlDeviceGetMemoryInfo_v2(device, &memory));
    *out = (Memory){memory.total, memory.free, memory.used + memory.reserved}; /* this one counts it as used */
    return SUCCESS;
}

Return nvmlDeviceGetComputeRunningProcesses_v3(Device *device, uint *count, Process *processes) {
    char list[WIDTH];
    uint pid, room = *count;
    u64 bytes;
    int length;
    TRY(get_text(device, "processes", "", list, sizeof list));
    *count = 0;
    for (char *next = list; sscanf(next, "%u:%llu%n", &pid, &bytes, &length) == 2; next += length, ++*count)
        if (*count < room)
            processes[*count] = (Process){pid, bytes, ~0u, ~0u};
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

Return nvmlDeviceGetMaxClockInfo(Device *device, uint type, uint *megahertz) {
    return type == 1 ? get_uint(device, "clock_max_sm", 1980, megahertz) : INVALID_ARGUMENT;
}

Return nvmlDeviceGetTemperature(Device *device, uint sensor, uint *celsius) {
    return sensor == 0 ? get_uint(device, "temperature", 30, celsius) : INVALID_ARGUMENT;
}

Return nvmlDeviceGetTemperatureV(Device *device, TemperatureV1 *out) {
    if (out->version != VERSION(TemperatureV1, 1))
        return VERSION_MISMATCH;
    return nvmlDeviceGetTemperature(device, out->sensor, (uint *)&out->temperature);
}

Return nvmlDeviceGetTemperatureThreshold(Device *device, uint type, uint *celsius) {
    static const char *const names[] = {"threshold_shutdown", "threshold_slowdown", "threshold_memory", "threshold_gpu"};
    static const int usual[] = {92, 90, 95, 87};
    return type < 4 ? get_uint(device, names[type], usual[type], celsius) : NOT_SUPPORTED;
}

/* Memory errors. */
Return nvmlDeviceGetEccMode(Device *device, uint *current, uint *pending) {
    TRY(get_uint(device, "ecc_mode", 1, current));
    return get_uint(device, "ecc_mode_pending", *current, pending);
}

Return nvmlDeviceGetTotalEccErrors(Device *device, uint type, uint counter, u64 *count) {
    static const char *const names[2][2] = {{"ecc_volatile_corrected", "ecc_aggregate_corrected"},
                                            {"ecc_volatile_uncorrected", "ecc_aggregate_uncorrected"}};
    uint mode, pending;
    TRY(nvmlDeviceGetEccMode(device, &mode, &pending));
    if (!mode)
        return NOT_SUPPORTED;
    return type < 2 && counter < 2 ? get_u64(device, names[type][counter], 0, count) : INVALID_ARGUMENT;
}

Return nvmlDeviceGetSramEccErrorStatus(Device *device, SramEcc *out) {
    if (out->version != VERSION(SramEcc, 1))
        return VERSION_MISMATCH;
    *out = (SramEcc){.version = out->version};
    TRY(get_u64(device, "sram_aggregate_uncorrected", 0, &out->aggregate_secded));
    TRY(get_u64(device, "sram_aggregate_corrected", 0, &out->aggregate_corrected));
    TRY(get_u64(device, "sram_volatile_uncorrected", 0, &out->volatile_secded));
    TRY(get_u64(device, "sram_volatile_corrected", 0, &out->volatile_corrected));
    return get_uint(device, "sram_threshold_exceeded", 0, &out->threshold_exceeded);
}

Return nvmlDeviceGetRemappedRows(Device *device, uint *corrected, uint *uncorrected, uint *pending, uint *failure) {
    TRY(get_uint(device, "remap_corrected", 0, corrected));
    TRY(get_uint(device, "remap_uncorrected", 0, uncorrected));
    TRY(get_uint(device, "remap_pending", 0, pending));
    return get_uint(device, "remap_failure", 0, failure);
}

Return nvmlDeviceGetRetiredPages(Device *device, uint cause, uint *count, u64 *addresses) {
    static const char *const names[] = {"retired_single_bit", "retired_double_bit"};
    uint room = *count;
    TRY(cause < 2 ? get_uint(device, names[cause], ABSENT, count) : INVALID_ARGUMENT);
    for (uint page = 0; page < *count && page < room; page++)
        addresses[page] = 0x10000 * (page + 1);
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

Return nvmlDeviceGetFieldValues(Device *device, int count, FieldValue *fields) {
    char key[WIDTH];
    TRY(enter(device));
    for (FieldValue *field = fields; field < fields + count; field++) {
        int recovery = field->id == FIELD_RECOVERY_ACTION; /* drivers from 570 on know it */
        snprintf(key, sizeof key, "field_%u", field->id);
        field->timestamp = (long long)(now(CLOCK_REALTIME) * 1e6);
        field->type = recovery ? TYPE_UINT : TYPE_ULONGLONG;
        field->result = number_in_file(device, recovery ? "recovery_action" : key, recovery ? 0 : ABSENT, &field->value);
    }
    return SUCCESS;
}

Return nvmlDeviceGetNvLinkState(Device *device, uint link, uint *active) {
    char key[WIDTH];
    uint links;
    TRY(get_uint(device, "nvlinks", 18, &links));
    snprintf(key, sizeof key, "nvlink_%u", link);
    return link < links ? get_uint(device, key, 1, active) : INVALID_ARGUMENT;
}

Return nvmlDeviceGetGpuFabricInfoV(Device *device, FabricInfo *out) {
    uint state, status;
    if (out->version != VERSION(FabricInfo, 2))
        return VERSION_MISMATCH;
    *out = (FabricInfo){.version = out->version};
    TRY(get_uint(device, "fabric_state", 0, &state));
    TRY(get_uint(device, "fabric_status", SUCCESS, &status));
    out->state = (unsigned char)state;
    out->status = (Return)status;
    return get_uint(device, "fabric_health", 0, &out->health);
}

/* Events. */
typedef struct { u64 types[MAX_GPUS]; uint next; } EventSet;

static int event(uint number, uint *gpu, u64 *type, u64 *data) {
    char key[WIDTH], value[WIDTH];
    snprintf(key, sizeof key, "event_%u", number);
    return look_up(NODE, key, value) && sscanf(value, "%u %llu %llu", gpu, type, data) == 3 && *gpu < MAX_GPUS;
}

Return nvmlEventSetCreate(EventSet **set) {
    uint gpu;
    u64 type, data;
    TRY(enter(NODE));
    *set = calloc(1, sizeof **set);
    for ((*set)->next = 1; event((*set)->next, &gpu, &type, &data);)
        (*set)->next++; /* what happened before is not delivered */
    return SUCCESS;
}

Return nvmlDeviceRegisterEvents(Device *device, u64 types, EventSet *set) {
    u64 supported;
    TRY(nvmlDeviceGetSupportedEventTypes(device, &supported));
    if (types & ~supported)
        return NOT_SUPPORTED;
    set->types[device - devices] |= types;
    return SUCCESS;
}

Return nvmlEventSetWait_v2(EventSet *set, EventData *data, uint timeout_ms) {
    uint gpu;
    u64 type, value, error;
    double deadline = now(CLOCK_MONOTONIC) + timeout_ms / 1e3;
    TRY(enter(NODE));
    do {
        while (event(set->next, &gpu, &type, &value)) {
            set->next++;
            *data = (EventData){&devices[gpu], type, value, ~0u, ~0u};
            if (set->types[gpu] & type)
                return SUCCESS;
        }
        for (gpu = 0; gpu < MAX_GPUS; gpu++)
            if (set->types[gpu] && !number_in_file(&devices[gpu], "error", 0, &error) && error == GPU_IS_LOST)
                return GPU_IS_LOST;
        doze();
    } while (now(CLOCK_MONOTONIC) < deadline);
    return TIMEOUT;
}

Return nvmlEventSetFree(EventSet *set) {
    TRY(enter(NODE));
    free(set);
    return SUCCESS;
}
