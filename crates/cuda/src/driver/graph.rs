use cudarc::driver::sys;

use super::{Device, Stream};
use crate::CudaError;
use crate::error::Check;

/// Work that was captured once and is queued again with one call.
pub struct Graph {
    device: Device,
    executable: sys::CUgraphExec,
}

// SAFETY: handles of the driver may be used from any thread, by one at a time; launching takes
// `&self`, but the driver locks it.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` queues on `stream`; nothing of it runs.
    ///
    /// # Errors
    /// What `work` returns, or when it did something that can't be captured, such as waiting.
    pub fn capture<E: From<CudaError>>(
        stream: &Stream,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Self, E> {
        // Other threads go on allocating and waiting meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) }.check("capturing a graph")?;
        let worked = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: a capture is running on this stream; the pointer is to a live local.
        let ended = unsafe { sys::cuStreamEndCapture(stream.raw(), &raw mut graph) };
        let made = worked.and_then(|()| {
            ended.check("capturing a graph")?;
            let mut executable = std::ptr::null_mut();
            // SAFETY: the capture gave a graph; the pointer is to a live local.
            unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0) }
                .check("instantiating a graph")?;
            Ok(Self {
                device: stream.device().clone(),
                executable,
            })
        });
        if !graph.is_null() {
            // SAFETY: given by the capture; the executable doesn't need it.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        made
    }

    /// Brings it to the GPU, which its first launch would do otherwise.
    ///
    /// # Errors
    /// When the GPU has no memory left.
    pub fn upload(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both are alive.
        unsafe { sys::cuGraphUpload(self.executable, stream.raw()) }.check("uploading a graph")
    }

    /// Queues it.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// What it touches is allocated as it was at the capture.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both are alive; the caller vouches for the memory.
        unsafe { sys::cuGraphLaunch(self.executable, stream.raw()) }.check("launching a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: instantiated in `capture`; the driver waits for launches that still run.
        let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
    }
}
