use crate::CudaError;
use crate::driver::{Device, Stream};
use crate::kernels::{GemmHopper, GemmPortable, Product};

/// Matrix products with the kernels that suit the GPU.
///
/// On one GPU an output's bits depend on its inputs alone: not on the number of tokens, nor on the SMs
/// that the stream has.
pub struct Linear {
    hopper: Option<GemmHopper>,
    portable: GemmPortable,
}

impl Linear {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let hopper = GemmHopper::fits(device).then(|| GemmHopper::load(device));
        Ok(Self {
            hopper: hopper.transpose()?,
            portable: GemmPortable::load(device)?,
        })
    }

    /// Computes a product.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// As [`GemmHopper::launch`] says.
    ///
    /// # Panics
    /// As [`GemmHopper::launch`].
    pub unsafe fn launch(&self, stream: &Stream, product: &Product) -> Result<(), CudaError> {
        // SAFETY: the caller vouches for what both ask for.
        unsafe {
            match &self.hopper {
                Some(hopper) => hopper.launch(stream, product),
                None => self.portable.launch(stream, product),
            }
        }
    }
}
