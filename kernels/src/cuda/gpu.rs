//! One device, one stream, the kernels, cuBLAS, and graphs.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublas::{CudaBlas, result::CublasError, sys as cublas};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaModule, CudaStream, DriverError, Profiler, result,
    sys,
};
#[cfg(feature = "nccl")]
use cudarc::nccl::result::NcclError;
use cudarc::nvrtc::Ptx;

use super::attention::ENDED;
use super::matrix::Staging;
use super::memory::{Arena, Buffer};
use super::parcel::{Outgoing, Parcels};
use super::step::StepRoom;
use super::tensor::{TALL, WIDE};

/// What a device can answer instead of a result.
#[derive(Debug)]
pub enum Error {
    /// The driver.
    Driver(DriverError),
    /// cuBLAS.
    Blas(CublasError),
    /// NCCL.
    #[cfg(feature = "nccl")]
    Nccl(NcclError),
    /// What was asked for does not exist there.
    Missing(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver(error) => write!(f, "CUDA: {error}"),
            Self::Blas(error) => write!(f, "cuBLAS: {error}"),
            #[cfg(feature = "nccl")]
            Self::Nccl(error) => write!(f, "NCCL: {error:?}"),
            Self::Missing(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl From<CublasError> for Error {
    fn from(error: CublasError) -> Self {
        Self::Blas(error)
    }
}

#[cfg(feature = "nccl")]
impl From<NcclError> for Error {
    fn from(error: NcclError) -> Self {
        Self::Nccl(error)
    }
}

/// Short for this folder's errors.
pub type Result<T> = std::result::Result<T, Error>;

/// Kernels by file, as `build.rs` compiled them.
const FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
/// What cuBLAS may use; what its documentation advises for Hopper.
const BLAS_WORKSPACE: usize = 32 << 20;

/// Kernels compiled for this, or newer, have `grid_wait` (common.cuh). As the driver counts.
const WAITS: i32 = 90;

/// A kernel, the shared memory that it may have, and whether it waits for those before it.
struct Loaded {
    function: CudaFunction,
    shared: u32,
    waits: bool,
}

/// One device. Work is asked for from one thread at a time.
pub struct Gpu {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    modules: Vec<Arc<CudaModule>>,
    /// With the dynamic shared memory that each may use.
    functions: Mutex<HashMap<&'static str, Loaded>>,
    pub(super) blas: CudaBlas,
    pub(super) arena: Arc<Arena>,
    /// Where the numbers of a batch are on their way through.
    pub(super) room: Mutex<Option<StepRoom>>,
    /// Where rows of weights are on their way through.
    pub(super) staging: Mutex<Option<Staging>>,
    /// Lists that were sent for the batch, by content.
    pub(super) lists: Mutex<HashMap<Vec<u32>, Buffer>>,
    /// Where numbers land on their way back.
    pub(super) parcels: Arc<Parcels>,
    /// Where they lie until they have left.
    pub(super) outgoing: Outgoing,
    /// Memory of rows that outlive their pass: recorded passes write to what was free in the other
    /// arena when they were recorded.
    pub(super) kept: Arc<Arena>,
    /// The tokens that were chosen last, and how many rows they are of.
    pub(super) chosen: Mutex<Option<(Buffer, usize)>>,
    /// Zeros between two uses.
    pub(super) ended: Buffer,
    /// The next number that is given to a store.
    ids: AtomicU64,
    /// What is asked for is recorded and not done.
    recording: AtomicBool,
    /// The device lets kernels overlap.
    overlaps: bool,
    /// The most shared memory that a block may have, in bytes.
    pub(super) shared_most: usize,
    /// Multiprocessors.
    pub(super) processors: usize,
    /// Rows up to which weights in blocks are multiplied as they lie.
    pub(super) tall_rows: usize,
    /// cuBLAS computes in it; graphs remember where it is.
    _workspace: Buffer,
}

/// One argument of a kernel, as it is in memory.
#[derive(Clone, Copy)]
pub(super) union Arg {
    pointer: sys::CUdeviceptr,
    integer: i32,
    float: f32,
    long: u64,
}

impl From<sys::CUdeviceptr> for Arg {
    fn from(pointer: sys::CUdeviceptr) -> Self {
        Self { pointer }
    }
}

impl From<i32> for Arg {
    fn from(integer: i32) -> Self {
        Self { integer }
    }
}

impl From<usize> for Arg {
    /// Sizes are counted in `int` by the kernels; what is larger is a bug of the caller.
    fn from(size: usize) -> Self {
        Self { integer: i32::try_from(size).expect("a size that a kernel can count") }
    }
}

impl From<f32> for Arg {
    fn from(float: f32) -> Self {
        Self { float }
    }
}

impl Arg {
    pub fn long(long: u64) -> Self {
        Self { long }
    }

    /// No memory: an argument that is absent.
    pub const NULL: Self = Self { long: 0 };
}

/// Blocks, threads of a block, dynamic shared memory.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub blocks: (u32, u32, u32),
    pub threads: u32,
    pub shared: u32,
}

impl Grid {
    pub fn new(blocks: usize, threads: u32) -> Self {
        Self { blocks: (count(blocks), 1, 1), threads, shared: 0 }
    }

    pub fn of(blocks: (usize, usize, usize), threads: u32, shared: u32) -> Self {
        let blocks = (count(blocks.0), count(blocks.1), count(blocks.2));
        Self { blocks, threads, shared }
    }
}

/// A kernel may begin while the one before it ends ("programmatic dependent launch").
fn overlap() -> sys::CUlaunchAttribute {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    sys::CUlaunchAttribute { id, pad: [0; 4], value }
}

/// What the device with this number calls itself, and its free memory in bytes.
pub fn describe(ordinal: usize) -> Result<(String, usize)> {
    let context = CudaContext::new(ordinal)?;
    Ok((context.name()?, context.mem_get_info()?.0))
}

fn count(blocks: usize) -> u32 {
    u32::try_from(blocks).expect("a grid that the device can count")
}

impl Gpu {
    /// The device with this number.
    pub fn new(ordinal: usize) -> Result<Self> {
        let context = CudaContext::new(ordinal)?;
        // SAFETY: one stream orders everything here, so nothing waits on events.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let load =
            |(_, bytes): &(&str, &[u8])| context.load_module(Ptx::from_binary(bytes.to_vec()));
        let modules = FATBINS.iter().map(load).collect::<std::result::Result<_, _>>()?;
        let blas = CudaBlas::new(Arc::clone(&stream))?;
        let workspace = Buffer::new(&context, BLAS_WORKSPACE)?;
        let place = workspace.at(0) as *mut c_void;
        // SAFETY: the workspace lives as long as the handle.
        unsafe { cublas::cublasSetWorkspace_v2(*blas.handle(), place, BLAS_WORKSPACE).result()? };
        let (arena, kept) = (Arena::new(&context), Arena::new(&context));
        let (functions, room, lists) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (staging, chosen, parcels) = (Mutex::default(), Mutex::default(), Arc::default());
        let ids = AtomicU64::new(0);
        // For comparisons: HEARTH_CUDA_OVERLAP=0 has each kernel begin when the last has ended.
        let wanted = std::env::var("HEARTH_CUDA_OVERLAP").map_or(true, |value| value != "0");
        let overlaps = wanted && context.compute_capability()?.0 >= WAITS / 10;
        let optin = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_most = usize::try_from(context.attribute(optin)?).unwrap_or(48 << 10);
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = usize::try_from(context.attribute(count)?).unwrap_or(1);
        // Only these have products of warpgroups; others were not measured. For comparisons:
        // HEARTH_CUDA_TALL=32 has more rows multiplied by cuBLAS.
        let measured = if context.compute_capability()?.0 == 9 { TALL } else { WIDE };
        let asked = std::env::var("HEARTH_CUDA_TALL").ok().and_then(|rows| rows.parse().ok());
        let tall_rows = asked.unwrap_or(measured);
        let ended = Buffer::new(&context, 4 * ENDED)?;
        let gpu = Self {
            context,
            stream,
            modules,
            functions,
            blas,
            arena,
            room,
            staging,
            lists,
            parcels,
            outgoing: Outgoing::default(),
            kept,
            chosen,
            ids,
            recording: AtomicBool::new(false),
            overlaps,
            shared_most,
            processors,
            tall_rows,
            ended,
            _workspace: workspace,
        };
        gpu.zero(&gpu.ended)?;
        Ok(gpu)
    }

    /// What the device calls itself.
    pub fn name(&self) -> String {
        self.context.name().unwrap_or_else(|_| "a CUDA device".to_owned())
    }

    /// Whether kernels begin while those before them end: the device can, and has code that waits.
    pub fn overlaps(&self) -> Result<bool> {
        Ok(self.overlaps && self.function("take_chosen", 0)?.1)
    }

    /// Free and total memory, in bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        Ok(self.context.mem_get_info()?)
    }

    /// Waits until all that was asked for is done.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.stream.synchronize()?)
    }

    /// Work that a profiler records, to its end, where one was told to wait for this.
    pub fn profiled<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        self.synchronize()?;
        let recorded = Profiler::new()?;
        let done = work();
        self.synchronize()?;
        drop(recorded);
        Ok(done)
    }

    /// A number that is given once.
    pub(super) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Writes zeros.
    pub(super) fn zero(&self, buffer: &Buffer) -> Result<()> {
        self.context.bind_to_thread()?;
        let stream = self.stream.cu_stream();
        // SAFETY: the whole buffer and nothing else.
        unsafe { result::memset_d8_async(buffer.at(0), 0, buffer.bytes(), stream)? };
        Ok(())
    }

    /// Copies within a buffer; the places do not overlap.
    pub(super) fn copy(&self, buffer: &Buffer, from: usize, to: usize, bytes: usize) -> Result<()> {
        assert!(from.max(to) + bytes <= buffer.bytes(), "a copy within the buffer");
        self.context.bind_to_thread()?;
        let stream = self.stream.cu_stream();
        // SAFETY: both places are in the buffer.
        unsafe { result::memcpy_dtod_async(buffer.at(to), buffer.at(from), bytes, stream)? };
        Ok(())
    }

    /// Runs a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in order; every pointer is valid for what the kernel
    /// does with the sizes given.
    pub(super) unsafe fn launch(&self, name: &'static str, grid: Grid, args: &[Arg]) -> Result<()> {
        let mut params = [std::ptr::null_mut::<c_void>(); 32];
        for (param, arg) in params.iter_mut().zip(args) {
            *param = std::ptr::from_ref(arg).cast_mut().cast();
        }
        // SAFETY: by the contract of this function; each argument lies in a union of 8 bytes.
        unsafe { self.launch_with(name, grid, &mut params[..args.len()]) }
    }

    /// The same with arguments of any size, by address.
    ///
    /// # Safety
    /// As [`Gpu::launch`]; every address is that of an argument of the kernel's type.
    pub(super) unsafe fn launch_with(
        &self,
        name: &'static str,
        grid: Grid,
        params: &mut [*mut c_void],
    ) -> Result<()> {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
            return Ok(());
        }
        let (function, waits) = self.function(name, grid.shared)?;
        let params = params.as_mut_ptr();
        self.context.bind_to_thread()?;
        let mut attributes = [overlap()];
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks.0,
            gridDimY: grid.blocks.1,
            gridDimZ: grid.blocks.2,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(self.overlaps && waits),
        };
        // SAFETY: by the contract of this function. A kernel that begins early waits for those
        // before it (`grid_wait` in common.cuh).
        unsafe { sys::cuLaunchKernelEx(&config, function, params, std::ptr::null_mut()).result()? };
        Ok(())
    }

    /// A kernel that may have so much shared memory, and whether it waits for those before it.
    fn function(&self, name: &'static str, shared: u32) -> Result<(sys::CUfunction, bool)> {
        use sys::CUfunction_attribute::{
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED_MOST,
            CU_FUNC_ATTRIBUTE_PTX_VERSION as COMPILED_FOR,
            CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as SHARED_OWN,
        };
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if !functions.contains_key(name) {
            let found = self.modules.iter().find_map(|module| module.load_function(name).ok());
            let missing = || Error::Missing(format!("there is no CUDA kernel `{name}`"));
            let function = found.ok_or_else(missing)?;
            // A newer device compiles the text of an older one, in which nothing waits.
            let waits = function.get_attribute(COMPILED_FOR)? >= WAITS;
            // What it has without asking, less what it has by itself.
            let own = u32::try_from(function.get_attribute(SHARED_OWN)?).unwrap_or(0);
            let shared = (48u32 << 10).saturating_sub(own);
            functions.insert(name, Loaded { function, shared, waits });
        }
        let loaded = functions.get_mut(name).expect("put above; this is a bug");
        if shared > loaded.shared {
            loaded.function.set_attribute(SHARED_MOST, shared as i32)?;
            loaded.shared = shared;
        }
        Ok((loaded.function.cu_function(), loaded.waits))
    }

    /// Memory with a copy of some numbers.
    pub(super) fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = Buffer::new(&self.context, bytes.len())?;
        // SAFETY: the buffer is as long as the slice, and the copy is waited for.
        unsafe { result::memcpy_htod_async(buffer.at(0), bytes, self.stream.cu_stream())? };
        self.synchronize()?;
        Ok(buffer)
    }

    /// What comes from the host, or goes there, is of one pass: a record would do it again with
    /// memory that is somebody else's by then.
    pub(super) fn of_one_pass(&self) -> Result<()> {
        match self.recording.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(Error::Missing("copies from or to the host in a recorded pass".into())),
        }
    }

    /// Some numbers into memory of the arena, ordered with everything else on the stream.
    pub(super) fn send<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Buffer> {
        self.of_one_pass()?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = self.arena.take(bytes.len())?;
        self.context.bind_to_thread()?;
        // SAFETY: the buffer holds them; the driver has read pageable memory when it returns.
        unsafe { result::memcpy_htod_async(buffer.at(0), bytes, self.stream.cu_stream())? };
        Ok(buffer)
    }

    /// Records what `work` asks for, without doing it.
    pub fn record<T, E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(Graph, T), E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.stream.begin_capture(mode).map_err(Error::from)?;
        let recording = Recording::of(self);
        let made = work();
        let graph = recording.end().map_err(Error::from);
        let (made, graph) = (made?, graph?);
        let graph = graph.ok_or_else(|| Error::Missing("nothing was recorded".to_owned()))?;
        graph.upload().map_err(Error::from)?;
        Ok((Graph(graph), made))
    }
}

/// A stream that records: whatever becomes of the work, a panic too, it must not go on so.
struct Recording<'a>(Option<&'a Gpu>);

impl<'a> Recording<'a> {
    fn of(gpu: &'a Gpu) -> Self {
        gpu.recording.store(true, Ordering::Relaxed);
        Self(Some(gpu))
    }

    fn end(mut self) -> std::result::Result<Option<CudaGraph>, DriverError> {
        self.0.take().map_or(Ok(None), Self::end_of)
    }

    fn end_of(gpu: &Gpu) -> std::result::Result<Option<CudaGraph>, DriverError> {
        gpu.recording.store(false, Ordering::Relaxed);
        // A flag of the driver that has no name for "none".
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        gpu.stream.end_capture(flags)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        drop(self.0.take().map(Self::end_of));
    }
}

/// Recorded work.
pub struct Graph(CudaGraph);

// SAFETY: a graph is launched by one thread at a time: whoever holds it has `&mut` or owns it.
unsafe impl Send for Graph {}

impl Graph {
    /// Asks for all of it again.
    pub fn replay(&self) -> Result<()> {
        Ok(self.0.launch()?)
    }
}
