use cudarc::driver::sys;

use super::Device;
use crate::CudaError;
use crate::error::Check;

/// Some of the multiprocessors (a green context): work on its streams runs there and nowhere else.
pub struct Partition {
    device: Device,
    raw: sys::CUgreenCtx,
    sms: u32,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Partition {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Partition {}

impl Partition {
    /// Divides the GPU: a partition of `sms` multiprocessors, rounded up to what the GPU can divide by (8
    /// on Hopper), and one of all others. Streams that are in no partition still use all.
    ///
    /// # Errors
    /// When the GPU or its driver can't do that.
    pub fn split(device: &Device, sms: u32) -> Result<[Self; 2], CudaError> {
        const WHAT: &str = "dividing the GPU's multiprocessors";
        device.bind()?;
        let kind = sys::CUdevResourceType::CU_DEV_RESOURCE_TYPE_SM;
        // SAFETY: all zeros is a value of this C struct.
        let [mut all, mut first, mut rest]: [sys::CUdevResource; 3] = unsafe { std::mem::zeroed() };
        let mut groups = 1;
        // SAFETY: the device is open; the pointers are to live locals, and one group is asked for.
        unsafe {
            sys::cuDeviceGetDevResource(device.handle(), &raw mut all, kind).check(WHAT)?;
            sys::cuDevSmResourceSplitByCount(
                &raw mut first,
                &raw mut groups,
                &raw const all,
                &raw mut rest,
                0,
                sms,
            )
            .check(WHAT)?;
        }
        Ok([Self::new(device, first)?, Self::new(device, rest)?])
    }

    fn new(device: &Device, mut resource: sys::CUdevResource) -> Result<Self, CudaError> {
        const WHAT: &str = "creating a partition of the GPU";
        // SAFETY: `split` got a resource of multiprocessors.
        let sms = unsafe { resource.__bindgen_anon_1.sm.smCount };
        let mut description = std::ptr::null_mut();
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUgreenCtxCreate_flags::CU_GREEN_CTX_DEFAULT_STREAM as u32;
        // SAFETY: the resource is the driver's; the pointers are to live locals.
        unsafe {
            sys::cuDevResourceGenerateDesc(&raw mut description, &raw mut resource, 1)
                .check(WHAT)?;
            sys::cuGreenCtxCreate(&raw mut raw, description, device.handle(), flags).check(WHAT)?;
        }
        Ok(Self {
            device: device.clone(),
            raw,
            sms,
        })
    }

    /// How many multiprocessors there are in it.
    pub fn sms(&self) -> u32 {
        self.sms
    }

    /// The device that it is a part of.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn raw(&self) -> sys::CUgreenCtx {
        self.raw
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: created in `new`; its streams, which keep it alive, are gone.
        let _ = unsafe { sys::cuGreenCtxDestroy(self.raw) };
    }
}
