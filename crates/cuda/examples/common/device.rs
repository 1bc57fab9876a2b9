//! The GPU that the programs run on.

use spate_cuda::CudaError;
use spate_cuda::driver::Device;

/// The first GPU; `None` if there is none to use, which it says.
pub(crate) fn first() -> Result<Option<Device>, CudaError> {
    match Device::open(0) {
        Err(CudaError::Unavailable(why)) => {
            println!("skipped: {why}");
            Ok(None)
        }
        opened => opened.map(Some),
    }
}
