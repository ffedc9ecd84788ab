"""What programs write when they fail: families of error lines, each with its failure class and whose fault it is.

A family is a kind of error, not one message: versions of a library word the same error differently. Sources are the
messages of CUDA, NCCL, torch, gloo, Slurm, Python and Linux (errno), and public reports of failed trainings
(tests/core/failures/data). A line that quotes another error belongs to the family of the quoted error, so the families
of quoted errors come first in the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from opt_ops.core.failures.classes import FailureClass


class Fault(StrEnum):
    """Whose fault an error is, as far as its words tell."""

    USER = "user"  # the program, its settings or its data: it fails on any node
    GPU = "gpu"
    NODE = "node"  # its driver, or its own link to the network
    NETWORK = "network"
    STORAGE = FailureClass.STORAGE.value
    CLIENT = "storage_client"  # the file system as this one node sees it
    MEMORY = "memory"  # of the host
    SCHEDULER = "scheduler"
    PEER = "peer"  # another rank: this one is a victim
    UNCLEAR = "unclear"


class Weight(IntEnum):
    """How much a line says about the cause. The lowest counts first."""

    CAUSE = 0  # an error that nothing else explains
    SYMPTOM = 1  # an error with several possible causes
    WRAPPER = 2  # it says that something else failed, and quotes it in another line
    END = 3  # the program's own last words: an exception, a lost peer, a notice of the scheduler
    WARNING = 4  # a library's warning, which need not be fatal
    CRASH = 5  # only that the process crashed


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of error lines.

    Attributes:
        name: Unique.
        kind: The failure class.
        fault: Whose fault it is.
        weight: How much such a line says.
        hints: One of these is in every line that `pattern` matches, in lower case.
        pattern: Searched in one line.
        numbers: Of CUDA errors (driver_types.h).
    """

    name: str
    kind: FailureClass
    fault: Fault
    weight: Weight
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    numbers: tuple[int, ...]


def find(line: str) -> Family | None:
    """The family of a line; None if it names no error.

    Most lines cost microseconds: a search for plain text (hints) is faster than one for patterns, so it comes first.
    """
    low = line.lower()
    if not any(hint in low for hint in _HINTS) or line.startswith(_FRAMES) or "NCCL INFO" in line:
        return None
    number = _NUMBER.search(line) if "cuda" in low else None
    code = int(number[1]) if number else None
    for family in FAMILIES:
        if code in family.numbers or (any(hint in low for hint in family.hints) and family.pattern.search(line)):
            return None if _NOISE.search(line) else family
    return None


def _family(
    name: str,
    kind: FailureClass,
    fault: Fault,
    weight: Weight,
    hints: str,
    *patterns: str,
    numbers: tuple[int, ...] = (),
) -> Family:
    return Family(name, kind, fault, weight, tuple(hints.split("|")), re.compile("|".join(patterns)), numbers)


_HINTS = (
    "error", "fail", "fatal", "exception", "kill", "cancel", "memory", "alloc", "watchdog", "assert", "timed",
    "timeout", "connect", "socket", "refused", "reset", "broken", "closed", "cuda", "gpu", "xid", "the bus",
    "bus error", "ecc", "nvlink", "driver", "cannot", "can't", "unable", "no space", "quota", "stale", "read-only",
    "written", "unexpected", "segmentation", "double free", "corrupt", "lost", "smashing", "abort", "terminat",
    "signal", "preempt", "interrupt", "oom", "in use", "errno", "exhausted", "shutdown", "rendezvous", "unreachable",
    "no route", "not known", "monitored", "net/", "ibv_", "ucx", "not found", "mismatch", "nccl", "gloo", "warn",
    "core dumped", "shm", "exit", "no devices", "communicat", "out of", "closure",
)  # fmt: skip
"""One of these is in every line that a family matches."""

_FRAMES = ("frame #", '  File "')
_NOISE = re.compile(
    r"NCCL TRACE|^\s*wandb:|resource_tracker|process group has NOT been destroyed|^Exception ignored in|"
    r"Stack trace of the failed collective|FlightRecorder|UserWarning|DeprecationWarning|"
    r"FutureWarning|ChildFailedError|^Traceback \(most recent|asynchronously reported at some other API call|"
    r"^(?:During handling of|The above exception was)|For debugging consider passing|object has no attribute '_?_?del|"
    r"Extension modules:|^\s*at (?:async )?\w+ \(|TORCH_USE_CUDA_DSA|^Search for `cuda\w+' in"
)
"""Lines that come with every failure, or after it."""

_CUDA_LIBRARY = r"(?:CUBLAS|CUDNN|CUFFT|CUSPARSE|CUSPARSELT|CUSOLVER|CURAND|CUBLASLT)(?:_STATUS)?_"
_NUMBER = re.compile(
    r"(?:\b[Ee]rror |[Cc]uda failure |runtime error \(|code[ =:]+|\breturned |CUDA_ERROR )\(?(\d{1,3})\b(?!%)"
)
"""How a number of the CUDA runtime (driver_types.h, cudaError) stands in a line."""

_RANK = r"^\W*(?:\[?rank ?\d+\]?[:\]]* *)?"
_PATH = r"['\"][^'\"]*/[^'\"]*['\"]"
_ERRNO = r"(?:[Ee]rrno|os error|\bcode:|\brc\b|\bRC\b)[ =:]*-?"

FAMILIES: tuple[Family, ...] = (
    _family(  # the next line, `what():`, says why
        "terminate", FailureClass.PROCESS_DEATH, Fault.UNCLEAR, Weight.CRASH,
        "terminate called", r"^\W*terminate called",
    ),
    # -- the program's own assertions on the GPU: they look like errors of the GPU
    _family(
        "device_assert", FailureClass.PROCESS_DEATH, Fault.USER, Weight.CAUSE,
        "assert",
        r"device-side assert(?!ion)", r"cudaErrorAssert|CUDA_ERROR_ASSERT|hipErrorAssert",
        r"block: \[\d+, ?\d+, ?\d+\], thread: \[\d+, ?\d+, ?\d+\] Assertion",
        numbers=(59, 710),
    ),
    _family(
        "wrong_cuda_call", FailureClass.PROCESS_DEATH, Fault.USER, Weight.CAUSE,
        "kernel image|kernelimage|no_binary|device function|configuration argument|resource handle|texture|"
        "symbol not found|capturing|streamcapture|invalid_value|not_supported|bad_param|ptx|"
        "too many resources|peer access|re-initialize|ncclinvalid|invalid usage|invalid argument|"
        "duplicate gpu",
        r"no kernel image is available|cudaErrorNoKernelImage|NO_BINARY_FOR_GPU|invalid device function",
        r"invalid (?:configuration argument|resource handle|texture)|named symbol not found",
        r"(?:not permitted|unsupported|invalidated?) when stream is capturing|StreamCapture",
        rf"{_CUDA_LIBRARY}(?:INVALID_VALUE|NOT_SUPPORTED|BAD_PARAM)|PTX.*unsupported toolchain",
        r"too many resources requested for launch|peer access (?:is already|has not been)",
        r"[Cc]annot re-initialize CUDA in forked subprocess",
        r"ncclInvalidUsage|ncclInvalidArgument|NCCL.*invalid (?:usage|argument)|Duplicate GPU detected",
    ),
    # -- links of this node, before memory: verbs report ENOMEM for a limit of locked memory
    _family(
        "own_link", FailureClass.COMMUNICATION, Fault.NODE, Weight.WARNING,
        "async event|fatal event|port error|socket interface|network interface|ibv_|catastrophic|nic ",
        r"[Gg]ot async event : |async fatal event|port error", r"no socket interface found|No usable network interface",
        r"ibv_\w+ failed.*(?:No such device|Unknown error -?\d* *$)|local catastrophic error|NIC .*(?:down|not found)",
    ),
    _family(
        "link", FailureClass.COMMUNICATION, Fault.NETWORK, Weight.WARNING,
        "ibv_|net/|mlx|ucx|psm|libfabric|ofi|retry",
        r"\bibv_\w+\b.*fail|\bmlx\d\w*: .*completion with error",
        r"\bNET/(?:IB|OFI|Socket|UCX|SHARP|Plugin)\b.*(?:WARN|[Ff]ail|[Ee]rror|[Cc]ompletion|trunc)",
        r"WARN.*\bNET/(?:IB|OFI|Socket|UCX)\b",
        r"\bUCX +(?:ERROR|FATAL)|\bPSM\w* .*(?:error|fail)|libfabric.*(?:error|fail)",
        r"NET/(?:IB|OFI) : Got completion", r"nccl_(?:net_)?ofi\w*[.:].*(?:WARN|error|fail)",
        r"[Tt]ransport retry (?:count )?exceeded",
    ),
    # -- memory
    _family(
        "shared_memory", FailureClass.OUT_OF_MEMORY, Fault.MEMORY, Weight.CAUSE,
        "torch_|/dev/shm|shared memory|bus error|shm",
        r"</?torch_\d+\w*>", r"/dev/[s]hm\S* .*(?:fail|No space|size \d+)|[Nn]o space.*/dev/[s]hm",
        r"(?:creating|extend(?:ing)?|attaching to|allocate) shared memory",
        r"(?:insufficient|out of|not enough) shared memory",
        r"killed by signal: Bus error|bus error encountered in worker",
        r"shm(?:get|at|_open|\w*) .*(?:failed|[Cc]annot allocate)",
    ),
    _family(
        "host_memory", FailureClass.OUT_OF_MEMORY, Fault.MEMORY, Weight.CAUSE,
        "memory|oom|alloc|errno|os error|code:|exceeded|signal: killed|rc:",
        r"(?i:oom[-_ ]?kill)|OOM[- ]Killed|oom_reaper|invoked oom-killer|Out of memory: Kill|cgroup out of memory",
        r"tasks? [\d,-]+: Out Of Memory|OUT_OF_MEMORY(?= +\d+:)|exceeded (?:job |step )?memory limit",
        r"Exceeded job memory",
        r"bad_alloc|\bMemoryError\b|ArrayMemoryError|ArrowMemoryError|bad_array_new_length",
        r"[Uu]nable to allocate .*(?:array|bytes|[KMGT]iB)|[Cc](?:annot|an't|an not|ould not) allocate (?:memory|\d)",
        rf"{_ERRNO}12\b|\bENOMEM\b|DataLoader worker .*killed by signal: Killed|[Nn]ot enough memory",
        r"(?:malloc|memory allocation) of (?:size )?\d+ (?:bytes )?failed|DefaultCPUAllocator|std::length_error.*alloc",
        r"[Ii]nsufficient (?:host |system )?memory|(?:[Nn]ode|worker).*running low on memory|heap out of memory",
        r"cudaHostAlloc|cudaHostRegister.*(?:fail|memory)|(?:mmap|mlock|pin).* failed.*memory|virtual memory exhausted",
    ),
    _family(
        "gpu_memory", FailureClass.OUT_OF_MEMORY, Fault.USER, Weight.CAUSE,
        "memory|alloc|exhausted|not_initialized|hbm|malloc",
        r"(?i:(?:cuda|hip|gpu|device|vram|triton)\b.*out of memory)", r"OutOfMemoryError|OUT_OF_MEMORY",
        r"cudaErrorMemoryAllocation|hipErrorOutOfMemory|RESOURCE_EXHAUSTED|ResourceExhaustedError",
        rf"{_CUDA_LIBRARY}\w*ALLOC\w*_FAILED|{_CUDA_LIBRARY}NOT_INITIALIZED",
        r"Failed to (?:CUDA|cuda) (?:host )?(?:calloc|malloc)",
        r"(?:cuda|cu|hip)(?:Malloc|MemAlloc|MemCreate)\w*.*(?:fail|out of memory)",
        r"(?:[Oo]ut|OUT|Out) of memory|out of HBM|[Nn]o available memory for the cache blocks",
        r"[Ff]ailed to allocate (?:memory|device|\d+)",
    ),
    # -- the card, its driver and its links
    _family(
        "gpu_hardware", FailureClass.GPU_ERROR, Fault.GPU, Weight.CAUSE,
        "ecc|nvlink|hardware|lost|off the bus|xid|rminitadapter|remap|reset|contained|uncorrect|dbe",
        r"(?i:uncorrect\w* (?:ecc|nvlink|memory)|\bdouble[- ]bit ecc|\becc (?:error|uncorrect)|\bdbe\b)",
        r"ECC_?UNCORRECTABLE|ECCUncorrectable|(?i:nvlink_?uncorrectable)|(?i:nvlink.*(?:error|fatal|fail))",
        r"(?i:hardware (?:stack )?error)|cudaErrorHardwareStackError|HARDWARE_STACK_ERROR",
        r"(?i:gpu_?\s?(?:is|has been|was)?_?\s?lost\b)|(?i:fallen off the bus)|\bXid\b|\bSXid\b|RmInitAdapter",
        r"(?i:row[- ]remap)",
        r"\bGPU\b.*(?:requires? reset|needs? (?:a )?reset|[Rr]eset [Rr]equired)|RESET_REQUIRED|ResetRequired",
        r"ContainedError|CONTAINED|contained error",
        numbers=(39, 214, 220, 226, 714),
    ),
    _family(
        "gpu_missing", FailureClass.GPU_ERROR, Fault.NODE, Weight.CAUSE,
        "unavailable|capable|nodevice|no_device|gpus|nvidia driver|ordinal|invaliddevice|invalid_device|"
        "no devices|unknown error|device id|num_gpus|not compiled|device handle",
        r"busy or unavailable|DevicesUnavailable|DEVICES?_UNAVAILABLE|DeviceUnavailable",
        r"[Nn]o (?:CUDA-capable|ROCm-capable|HIP-capable) device",
        r"cudaErrorNoDevice|CUDA_ERROR_NO_DEVICE",
        r"[Nn]o (?:CUDA|HIP|NVIDIA)?[ -]?GPUs? (?:are|is|were|was) (?:available|found|detected)",
        r"(?i:found no nvidia driver)|invalid device ordinal|InvalidDevice\b|INVALID_DEVICE\b|[Nn]o devices were found",
        r"CUDA unknown error|[Ii]nvalid device id|device < num_gpus|(?i:torch not compiled with cuda enabled.*driver)",
        r"(?i:unable to determine the device handle)",
        numbers=(38, 46, 100, 101),
    ),
    _family(
        "gpu_driver", FailureClass.GPU_ERROR, Fault.NODE, Weight.CAUSE,
        "system not|notready|not_ready|fabric|driver|mismatch|compat|nvml|mps",
        r"system not (?:yet )?(?:initialized|ready)|SystemNotReady|SYSTEM_NOT_READY",
        r"(?i:fabric[ -]?manager|fabric state)",
        r"unsupported display driver|(?:System)?DriverMismatch|SYSTEM_DRIVER_MISMATCH",
        r"(?i:(?:library|version) mismatch.*nvml|nvml.*mismatch)",
        r"(?i:driver/library version mismatch)|LibRmVersionMismatch|RM version mismatch",
        r"(?i:driver.*version is insufficient)",
        r"InsufficientDriver|(?i:nvidia driver on your system is too old)|forward compatibility was attempted",
        r"CompatNotSupported",
        r"(?i:couldn't communicate with the nvidia driver)|NVMLError|NVML_ERROR|NVML_SUCCESS == ",
        r"(?i:failed to initialize nvml)|DriverNotLoaded",
        r"(?i:cuda driver initialization failed)|driver shutting down|(?i:can'?t initialize nvml|nvml_init failed)",
        r"(?i:mps (?:server|client).*(?:error|fail|terminat))|MpsConnectionFailed|MPS_CONNECTION_FAILED",
        numbers=(35, 802, 803, 804),
    ),
    _family(
        "gpu_wrapper", FailureClass.GPU_ERROR, Fault.UNCLEAR, Weight.WRAPPER,
        "unhandled|call to",
        r"unhandled (?:cuda|hip) error|ncclUnhandledCudaError|Call to (?:CUDA|HIP) function failed",
    ),
    _family(
        "gpu_fault", FailureClass.GPU_ERROR, Fault.UNCLEAR, Weight.SYMPTOM,
        "illegal|launch|misaligned|invalid p|invalidpc|address space|addressspace|access fault|hsa_|"
        "execution_failed|exec_failed|internal_error|mapping_error|cuda error|hip error|cuda failure|"
        "cuda driver error|cuda runtime error|cuda kernel|hip failure|triton error|acceleratorerror|cudaerror|"
        "cuda_error|hiperror",
        r"illegal memory access|[Ii]llegal_?[Aa]ddress|ILLEGAL_ADDRESS|an illegal (?:instruction|barrier)",
        r"IllegalInstruction|ILLEGAL_INSTRUCTION",
        r"(?:unspecified )?launch (?:failure|timed out)|LaunchFailure|LAUNCH_(?:FAILED|TIMEOUT)",
        r"misaligned address|Misaligned_?[Aa]ddress|MISALIGNED",
        r"invalid (?:program counter|pc\b|address space)|InvalidPc|InvalidAddressSpace",
        r"[Mm]emory access fault by GPU|HSA_STATUS_ERROR",
        rf"{_CUDA_LIBRARY}(?:EXECUTION_FAILED|EXEC_FAILED|INTERNAL_ERROR|MAPPING_ERROR)",
        r"(?:CUDA|HIP|cuda|Cuda|hip)(?: driver| runtime| kernel)? (?:error|ERROR|failure)\b(?=.*[:'(])",
        r"Triton Error \[(?:CUDA|HIP)\]|AcceleratorError|\bcudaError[A-Z]\w+|\bCUDA_ERROR_[A-Z]|\bhipError[A-Z]\w+",
        numbers=(700, 702, 715, 716, 717, 718, 719, 999),
    ),
    # -- the file system; a socket reports some of these numbers, too
    _family(
        "port_or_peer_errno", FailureClass.COMMUNICATION, Fault.PEER, Weight.END,
        "endpoint|timed out|is down",
        r"(?i:socket|gloo|tcpstore|c10d|nccl|getpeername|rendezvous).*(?:endpoint is not connected|timed out|is down)",
    ),
    _family(
        "file_system_client", FailureClass.STORAGE, Fault.CLIENT, Weight.CAUSE,
        "endpoint|stale|remote i/o|host is down|structure needs|communication error|estale|eshutdown|enotconn|"
        "eremoteio|errno|os error|code:|rc:|timed out|connection abort|no locks",
        r"[Tt]ransport endpoint is not connected|[Cc]annot send after transport endpoint shutdown",
        r"Stale (?:NFS )?file handle",
        r"Remote I/O error|Host is down|Structure needs cleaning|Communication error on send|\bESTALE\b",
        r"\bESHUTDOWN\b|\bENOTCONN\b|\bEREMOTEIO\b",
        rf"{_ERRNO}(?:107|108|112|116|117|121|512)\b", rf"{_ERRNO}(?:103|104|110|111|113)\b.*{_PATH}",
        r"(?:Connection timed out|Software caused connection abort|No locks available).*(?:['\"]/|/\w+/)",
    ),
    _family(
        "file_system", FailureClass.STORAGE, Fault.STORAGE, Weight.CAUSE,
        "i/o error|input/output|dowrite|doread|no space|read-only|quota|storagefull|errno|os error|code:|rc:|"
        "eio|enospc|erofs|edquot|locks|streamwriter|inline_container|unexpected pos|write failed|"
        "requested and|space|disk|iostream|short write|write data",
        r"Input/output error|disk I/O error|\bdo(?:Write|Read)<|No space left on device",
        r"Read-only file ?system|[Qq]uota (?:was |limit )?exceeded",
        r"StorageFull|QuotaExceeded",
        rf"{_ERRNO}(?:5|28|30|37|122)\b",
        r"\bEIO\b|\bENOSPC\b|\bEROFS\b|\bEDQUOT\b|[Nn]o locks available|FilesystemQuota",
        r"PytorchStreamWriter|inline_container\.cc.*(?:writ|unexpected pos)|unexpected pos \d+ vs|file write failed",
        r"\d+ requested and \d+ written|[Nn]ot enough (?:free |disk )?space|[Dd]isk (?:is )?full",
        r"iostream error|[Ss]hort write|Can't write data",
    ),
    # -- other ranks
    _family(
        "web", FailureClass.PROCESS_DEATH, Fault.USER, Weight.END,
        "http|requests.|urllib|botocore|hub",
        r"HTTPS?ConnectionPool|requests\.exceptions|urllib3?\.|httpx?\.|huggingface_hub|botocore|aiohttp",
        r"HfHubHTTPError",
    ),
    _family(
        "lost_peer", FailureClass.COMMUNICATION, Fault.PEER, Weight.END,
        "dist|rendezvous|nccl|watchdog|collective|timed out|timeout|operations|gloo|socket|tcpstore|c10d|"
        "store|connect|broken|recv|send|monitored|peer|pair|find address|remote|communication|heartbeat|failed to|"
        "mpi_|pmix|orte|unavailable|deadline|coordination|joined|exception (|failure detected|"
        "taking the entire",
        r"Dist(?:Backend|Network|Store)Error|\b[Rr]endezvous\w*(?:Error|Timeout|Exception)|NCCL [Ee]rror",
        r"nccl(?:System|Remote|Internal|InProgress)Error",
        r"[Ww]atchdog (?:caught|thread|at work|got stuck|timeout|hang)|(?:by|'s) watchdog",
        r"[Cc]ollective (?:operation )?time(?:out|d out)",
        r"NCCL.*(?:time[ds]? ?out|aborted|hang|unhandled system)",
        r"(?:operations|collectives?) (?:\w+ )*(?:failed or )?timed out|taking the entire process down",
        r"(?i:gloo).*(?:fail|error|timed? ?out|clos|reset|enforce)|[Ss]ocket [Tt]imeout|SocketError|SocketException",
        r"[Tt]imed out (?:after \d+ ?\w* )?waiting|[Ww]ait timeout|store->|[Tt]imed out initializing",
        r"[Ss]tore[- ]based barrier|TCPStore|C10dStore",
        r"c10d.*(?:fail|error|timed? ?out)",
        r"Connection (?:was )?(?:reset|closed|aborted|lost)|Broken pipe|BrokenPipeError",
        r"Connection\w*Error\b(?!.*https?)",
        r"(?:client|server) socket has (?:failed|timed)|failed to (?:recv|send)\b",
        r"(?:recv|send)(?:Value|Bytes|String|Vector)|[Mm]onitored ?[Bb]arrier",
        r"remote process (?:exited|has)|closed by (?:remote )?peer|(?:lost|loss of) communication",
        r"peer (?:is )?(?:gone|lost|disconnected|closed)|pair closure|[Uu]nable to find address for",
        r"[Hh]eartbeat (?:monitor )?(?:timed out|timeout)|HeartbeatMonitor",
        r"Ranks? [\d, ]+ failed to (?:pass|join|respond)|[Pp]eer[- ]to[- ]peer.*timed out",
        r"MPI_ABORT|MPI_Abort|PMIX ERROR|ORTE|unreachable remote|UNAVAILABLE: .*(?:connect|peer|heartbeat|unhealthy)",
        r"DEADLINE_EXCEEDED|CoordinationService",
        r"workers? joined|clients joined|Exception \(either an error or timeout\)|failure detected by",
    ),
    _family(
        "network", FailureClass.COMMUNICATION, Fault.NETWORK, Weight.END,
        "in use|eaddrinuse|port|assign|route|network|not known|resolution|gai|retrieved|connect|utilizing|"
        "bind|errno|os error|code:|rc:",
        r"[Aa]ddress already in use|EADDRINUSE|port \d+ is (?:already )?in use|port.*(?:in use|unavailable)",
        r"[Cc]annot assign requested address",
        r"No route to host|[Nn]etwork is (?:unreachable|down)|Name or service not known",
        r"[Tt]emporary failure in name resolution|gai error|cannot be retrieved",
        r"Connection (?:refused|timed out)|connect(?:ion)? (?:to \S+ )?(?:failed|refused|timed out)",
        r"failed to connect|(?:[Cc]ould not|[Uu]nable to|[Cc]annot) connect|another process is utilizing",
        r"couldn't connect|Failed to bind",
        rf"{_ERRNO}(?:32|98|99|100|101|102|103|104|105|110|111|113)\b",
    ),
    _family(
        "nccl_warning", FailureClass.COMMUNICATION, Fault.NETWORK, Weight.WARNING,
        "nccl warn|[w",
        r"NCCL WARN (?!.*(?:deprecat|Plugin|plugin|version|NCCL_\w+ (?:set|environment)|not recommended|MNNVL)).*",
        r"\[W.*(?:socket\.cpp|TCPStore\.cpp|ProcessGroup\w+\.cpp)",
    ),
    # -- the scheduler and the launcher
    _family(
        "scheduler", FailureClass.PROCESS_DEATH, Fault.SCHEDULER, Weight.END,
        "cancelled|due to|signal|aborted|termination|terminated|sigterm|sigint|sighup|sigusr|sigcont|"
        "preempted|requeued|time limit|srun:|keyboardinterrupt",
        r"CANCELLED (?:AT|by)|DUE TO (?:TIME|PREEMPT|NODE|JOB)|SignalException|[Rr]eceived \S+ death signal",
        r"[Gg]ot signal:? ?\d+",
        r"Job step aborted|forcing job termination",
        r"(?i:(?:caught|received|got)(?: signal)? sig(?:term|int|hup|usr\d|cont))|^Terminated\b",
        r"(?i:job .*(?:preempted|requeued|time limit))|srun: .*(?:Terminated|Node failure|Killed$)",
        r"Force Terminated|KeyboardInterrupt",
    ),
    # -- only that it crashed
    _family(
        "crash", FailureClass.PROCESS_DEATH, Fault.UNCLEAR, Weight.CRASH,
        "segmentation|double free|corrupt|smashing|bus error|illegal instruction|floating point|dumped|free()|"
        "munmap|realloc|sysmalloc|pure virtual|fatal python|killed|aborted|exit|signal",
        r"[Ss]egmentation fault|double free|corrupted (?:size|top|double|unsorted|unaligned)",
        r"memory corruption|stack smashing|Bus error",
        r"Illegal instruction|Floating point exception|core dumped|free\(\): |munmap_chunk|realloc\(\): ",
        r"sysmalloc|pure virtual method",
        r"Fatal Python error|: +\d+ (?:Killed|Aborted)\b|[Ee]xited with exit code|exited unexpectedly",
        r"Aborted!?$|killed by signal",
    ),
    _family(
        "exception", FailureClass.PROCESS_DEATH, Fault.USER, Weight.END,
        "error|exception|fail|exit|notfound|: |what()|command not found|can't open|no such file|shared object|"
        "assert|panicked",
        rf"{_RANK}(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Failed|Failure|Exit|NotFound)\b *(?::|$|\()",
        rf"{_RANK}(?:[a-z_]\w*\.)+[A-Z]\w+: ",
        r"^\w*(?:Exception|Error|error|fatal|FATAL)\b *:",
        r"^\s+what\(\): +", r"^[\w./-]+: error: |command not found|can't open file|[Nn]o such file or directory",
        r"cannot open shared object",
        r"Assertion .* failed|panicked at ",
    ),
)  # fmt: skip
"""In this order a line is compared with them; the first that matches counts."""
