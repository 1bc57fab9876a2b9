use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::CudaError;
use crate::error::Check;

/// The driver interface that the kernel images need, as `cuDriverGetVersion` counts: CUDA 13.0.
const DRIVER_VERSION: i32 = 13_000;

/// The oldest architecture that the kernels are written for (Ampere).
const OLDEST: (u32, u32) = (8, 0);

/// A GPU with its primary context. Cheap to clone; the context lives as long as the last clone.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    handle: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    capability: (u32, u32),
    sms: u32,
    l2_bytes: u64,
    shared_bytes: u32,
    total_bytes: u64,
    peaks: Peaks,
    driver: i32,
}

/// What a GPU could do at its highest clocks, per second, as the driver knows them; 0 where it does not.
#[derive(Debug, Clone, Copy)]
pub struct Peaks {
    /// Bytes read from memory.
    pub read: f64,
    /// Multiplications and additions of bfloat16 matrix products with float32 sums.
    pub matrix: f64,
}

impl Peaks {
    fn new(handle: sys::CUdevice, capability: (u32, u32), sms: u32) -> Result<Self, CudaError> {
        let hertz = |clock| Ok::<_, CudaError>(1e3 * f64::from(attribute(handle, clock)?));
        let core = hertz(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
        let memory = hertz(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bus = attribute(
            handle,
            Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH,
        )?;
        // Of an SM's tensor cores, in a cycle.
        let operations = match capability {
            (10, _) => 8192.0,
            (9, _) => 4096.0,
            (8, 0) => 2048.0,
            _ => 1024.0,
        };
        Ok(Self {
            // Two transfers a cycle.
            read: 2.0 * memory * f64::from(bus) / 8.0,
            matrix: operations * f64::from(sms) * core,
        })
    }
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Inner {}

impl Device {
    /// Opens a GPU and binds it to this thread.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] when there is no driver, it is too old, there is no such GPU or
    /// the kernels don't run on it: the message is one line for a human. Otherwise what the driver
    /// said.
    pub fn open(ordinal: u32) -> Result<Self, CudaError> {
        let driver = driver_version()?;
        let (count, mut handle) = (device_count()?, 0);
        if ordinal >= count {
            return Err(CudaError::Unavailable(format!(
                "GPU {ordinal} was asked for, this machine has {count}"
            )));
        }
        // SAFETY: `cuInit` succeeded in `driver_version`; the pointer is to a live local.
        unsafe { sys::cuDeviceGet(&raw mut handle, ordinal as c_int) }.check("opening the GPU")?;
        let capability = (
            attribute(
                handle,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            )?,
            attribute(
                handle,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )?,
        );
        let name = device_name(handle)?;
        if capability < OLDEST {
            return Err(CudaError::Unavailable(format!(
                "{name} has compute capability {}.{}, the kernels need {}.{} or later",
                capability.0, capability.1, OLDEST.0, OLDEST.1
            )));
        }
        let mut total_bytes = 0;
        // SAFETY: as above.
        unsafe { sys::cuDeviceTotalMem_v2(&raw mut total_bytes, handle) }
            .check("reading the GPU's memory size")?;
        let optin = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let sms = attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let l2_bytes = attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let shared_bytes = attribute(handle, optin)?;
        let peaks = Peaks::new(handle, capability, sms)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: as above. Released by `Inner::drop`.
        unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, handle) }
            .check("creating a context on the GPU")?;
        let device = Self(Arc::new(Inner {
            handle,
            context,
            name,
            capability,
            sms,
            l2_bytes: l2_bytes.into(),
            shared_bytes,
            total_bytes: total_bytes as u64,
            peaks,
            driver,
        }));
        device.bind()?;
        Ok(device)
    }

    /// Makes this device the one that this thread's calls go to.
    ///
    /// # Errors
    /// When the context is lost.
    pub fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { sys::cuCtxSetCurrent(self.0.context) }.check("binding the GPU to a thread")
    }

    /// Waits for everything that was submitted.
    ///
    /// # Errors
    /// When something of it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: a context is bound.
        unsafe { sys::cuCtxSynchronize() }.check("waiting for the GPU")
    }

    pub(super) fn handle(&self) -> sys::CUdevice {
        self.0.handle
    }

    /// Marketing name, such as `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Compute capability, such as (9, 0).
    pub fn capability(&self) -> (u32, u32) {
        self.0.capability
    }

    /// Streaming multiprocessors.
    pub fn sms(&self) -> u32 {
        self.0.sms
    }

    /// Size of the L2 cache.
    pub fn l2_bytes(&self) -> u64 {
        self.0.l2_bytes
    }

    /// Most shared memory that one block may use.
    pub fn shared_bytes(&self) -> u32 {
        self.0.shared_bytes
    }

    /// Memory of the GPU.
    pub fn total_bytes(&self) -> u64 {
        self.0.total_bytes
    }

    /// What it could do at its highest clocks.
    pub fn peaks(&self) -> Peaks {
        self.0.peaks
    }

    /// The newest CUDA that the driver knows, 1000 * major + 10 * minor.
    pub fn driver_version(&self) -> i32 {
        self.0.driver
    }

    /// Memory that nobody uses, of all programs on this GPU.
    ///
    /// # Errors
    /// When the context is lost.
    pub fn free_bytes(&self) -> Result<u64, CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: a context is bound; the pointers are to live locals.
        unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }
            .check("reading free GPU memory")?;
        Ok(free as u64)
    }

    /// Whether kernels may be launched before their predecessor has ended (programmatic dependent
    /// launch). It needs images in which the kernels wait by themselves: those for the
    /// architectures 9.0 and 10.0, not the portable PTX for 8.0 that all later ones run.
    pub fn has_dependent_launch(&self) -> bool {
        matches!(self.capability(), (9 | 10, 0))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained in `open`; nothing that needs the context outlives it.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

/// Whether there is an NVIDIA driver, be it usable or not.
pub fn is_installed() -> bool {
    // SAFETY: only looks for the library.
    unsafe { sys::is_culib_present() }
}

/// Number of GPUs of this machine, usable or not.
///
/// # Errors
/// [`CudaError::Unavailable`] without a driver, or with one that is too old.
pub fn device_count() -> Result<u32, CudaError> {
    driver_version()?;
    let mut count = 0;
    // SAFETY: `cuInit` succeeded in `driver_version`; the pointer is to a live local.
    unsafe { sys::cuDeviceGetCount(&raw mut count) }.check("counting GPUs")?;
    Ok(count.unsigned_abs())
}

/// Loads and initialises the driver.
fn driver_version() -> Result<i32, CudaError> {
    if !is_installed() {
        return Err(CudaError::Unavailable(
            "libcuda was not found; the NVIDIA driver is not installed".into(),
        ));
    }
    let mut version = 0;
    // SAFETY: the library is there; these two functions are in every version of it.
    let init = unsafe { sys::cuInit(0) }.check("starting the NVIDIA driver");
    if let Err(error) = init {
        return Err(CudaError::Unavailable(error.to_string()));
    }
    // SAFETY: the pointer is to a live local.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.check("reading the driver's version")?;
    if version < DRIVER_VERSION {
        return Err(CudaError::Unavailable(format!(
            "the NVIDIA driver knows CUDA {}.{}, the kernels need {}.{} (driver 580 or later)",
            version / 1000,
            version % 1000 / 10,
            DRIVER_VERSION / 1000,
            DRIVER_VERSION % 1000 / 10
        )));
    }
    Ok(version)
}

fn attribute(device: sys::CUdevice, which: Attribute) -> Result<u32, CudaError> {
    let mut value = 0;
    // SAFETY: the device is open and the pointer is to a live local.
    unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) }
        .check("reading a property of the GPU")?;
    Ok(value.unsigned_abs())
}

fn device_name(device: sys::CUdevice) -> Result<String, CudaError> {
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: the buffer is as long as is said, and what is written ends with a zero.
    unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device)
            .check("reading the GPU's name")?;
        Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
    }
}
