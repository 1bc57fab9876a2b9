use std::ffi::{c_int, c_uint};
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::{Device, Partition, Plain, Slice};
use crate::CudaError;
use crate::error::Check;

/// Which of two streams the GPU serves first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Work that can wait.
    Low,
    /// Work that somebody waits for.
    High,
}

impl Priority {
    /// The driver's number. A context is bound.
    fn value(self) -> Result<c_int, CudaError> {
        let (mut low, mut high) = (0, 0);
        // SAFETY: the pointers are to live locals.
        unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut low, &raw mut high) }
            .check("reading stream priorities")?;
        Ok(match self {
            Self::Low => low,
            Self::High => high,
        })
    }
}

/// A queue of work that runs in order.
pub struct Stream {
    device: Device,
    raw: sys::CUstream,
    sms: u32,
    /// What it runs on, if that is not the whole device.
    _partition: Option<Arc<Partition>>,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks a stream's queue.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream whose kernels may fill the whole GPU.
    ///
    /// # Errors
    /// When the driver has no more.
    pub fn new(device: &Device, priority: Priority) -> Result<Self, CudaError> {
        device.bind()?;
        let (priority, mut raw) = (priority.value()?, std::ptr::null_mut());
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: a context is bound; the pointer is to a live local.
        unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, flags, priority) }
            .check("creating a stream")?;
        Ok(Self {
            device: device.clone(),
            raw,
            sms: device.sms(),
            _partition: None,
        })
    }

    /// A stream whose kernels run on a part of the GPU.
    ///
    /// # Errors
    /// When the driver has no more.
    pub fn within(partition: &Arc<Partition>, priority: Priority) -> Result<Self, CudaError> {
        let device = partition.device();
        device.bind()?;
        let (priority, mut raw) = (priority.value()?, std::ptr::null_mut());
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: the partition is alive; the pointer is to a live local.
        unsafe { sys::cuGreenCtxStreamCreate(&raw mut raw, partition.raw(), flags, priority) }
            .check("creating a stream on a part of the GPU")?;
        Ok(Self {
            device: device.clone(),
            raw,
            sms: partition.sms(),
            _partition: Some(Arc::clone(partition)),
        })
    }

    /// The same stream, with fewer SMs for its persistent kernels: the rest is left to other
    /// streams.
    #[must_use]
    pub fn with_sms(mut self, sms: u32) -> Self {
        self.sms = sms.clamp(1, self.device.sms());
        self
    }

    /// SMs that a persistent kernel on this stream should fill: the size of its grid is a multiple.
    pub fn sms(&self) -> u32 {
        self.sms
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Queues a copy to the GPU.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// `from` is not changed, and `to` stays allocated, until the copy has run. Only with page-locked
    /// memory does it not block.
    ///
    /// # Panics
    /// If the lengths differ.
    pub unsafe fn upload<T: Plain>(&self, from: &[T], to: Slice<T>) -> Result<(), CudaError> {
        assert_eq!(from.len(), to.len(), "lengths of an upload");
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: both stretches are as long; the caller vouches for their lives.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.address(), from.as_ptr().cast(), to.bytes(), self.raw)
        }
        .check("copying to the GPU")
    }

    /// Queues a copy from the GPU.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// `to` is not touched, and `from` stays allocated, until the copy has run. Only with page-locked
    /// memory does it not block.
    ///
    /// # Panics
    /// If the lengths differ.
    pub unsafe fn download<T: Plain>(&self, from: Slice<T>, to: &mut [T]) -> Result<(), CudaError> {
        assert_eq!(from.len(), to.len(), "lengths of a download");
        if to.is_empty() {
            return Ok(());
        }
        let bytes = from.bytes();
        // SAFETY: both stretches are as long; the caller vouches for their lives.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.address(), bytes, self.raw)
        }
        .check("copying from the GPU")
    }

    /// Queues a copy within the GPU.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Both stretches stay allocated until the copy has run, and don't overlap.
    ///
    /// # Panics
    /// If the lengths differ.
    pub unsafe fn copy<T: Plain>(&self, from: Slice<T>, to: Slice<T>) -> Result<(), CudaError> {
        assert_eq!(from.len(), to.len(), "lengths of a copy");
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: both stretches are as long; the caller vouches for their lives.
        unsafe { sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), to.bytes(), self.raw) }
            .check("copying on the GPU")
    }

    /// Queues a fill with a byte.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// The memory stays allocated until the fill has run.
    pub unsafe fn fill<T: Plain>(&self, to: Slice<T>, byte: u8) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller vouches for the memory.
        unsafe { sys::cuMemsetD8Async(to.address(), byte, to.bytes(), self.raw) }
            .check("filling GPU memory")
    }

    /// Waits until everything queued has run.
    ///
    /// # Errors
    /// When something of it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream is alive.
        unsafe { sys::cuStreamSynchronize(self.raw) }.check("waiting for a stream")
    }

    /// Whether everything queued has run.
    ///
    /// # Errors
    /// When something that ran has failed.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        // SAFETY: the stream is alive.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => status.check("running a step").map(|()| true),
        }
    }

    /// Marks the work queued so far.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both are alive.
        unsafe { sys::cuEventRecord(event.raw, self.raw) }.check("recording an event")
    }

    /// What is queued from now on waits for an event of another stream.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both are alive.
        unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) }.check("waiting for an event")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // What is queued may use memory that its owner frees next.
        let _ = self.device.bind();
        let _ = self.synchronize();
        // SAFETY: created in `new`.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A point in a stream.
pub struct Event {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that also tells the time.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        device.bind()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as c_uint;
        // SAFETY: a context is bound; the pointer is to a live local.
        unsafe { sys::cuEventCreate(&raw mut raw, flags) }.check("creating an event")?;
        Ok(Self {
            device: device.clone(),
            raw,
        })
    }

    /// Whether it has been reached.
    ///
    /// # Errors
    /// When work before it failed.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => status.check("asking for an event").map(|()| true),
        }
    }

    /// Waits until it is reached.
    ///
    /// # Errors
    /// When work before it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the event is alive.
        unsafe { sys::cuEventSynchronize(self.raw) }.check("waiting for an event")
    }

    /// Device time from an earlier event. Both must have been reached.
    ///
    /// # Errors
    /// When one of them has not been reached.
    pub fn since(&self, earlier: &Event) -> Result<Duration, CudaError> {
        let mut ms = 0.0;
        // SAFETY: both are alive; the pointer is to a live local.
        unsafe { sys::cuEventElapsedTime_v2(&raw mut ms, earlier.raw, self.raw) }
            .check("reading the time between events")?;
        Ok(Duration::from_secs_f32(ms.max(0.0) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: created in `new`.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}
