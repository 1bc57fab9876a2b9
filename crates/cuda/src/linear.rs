use half::bf16;

use crate::CudaError;
use crate::driver::{Device, Slice, Stream};
use crate::kernels::{Form, GemmHopper, GemmPortable, Packed, Product};

/// Matrix products with the kernels that suit the GPU.
///
/// On Hopper an output's bits depend on its inputs alone: not on the number of tokens, nor on the SMs
/// that the stream has, nor on whether quantised weights are unpacked. Elsewhere that holds, too, but
/// for the last: it is not known for the tensor cores of each.
pub struct Linear {
    hopper: Option<GemmHopper>,
    portable: GemmPortable,
    packed: Packed,
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
            packed: Packed::load(device)?,
        })
    }

    /// The kernels for quantised weights.
    pub fn packed(&self) -> &Packed {
        &self.packed
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

    /// Computes a product with quantised weights in the place of its own. For many tokens they are
    /// unpacked into `scratch`, which has room for them, first.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// As [`Packed::multiply`] says; and nothing else uses `scratch` until the product is computed.
    ///
    /// # Panics
    /// As [`Packed::multiply`] and [`GemmHopper::launch`].
    pub unsafe fn launch_packed(
        &self,
        stream: &Stream,
        form: Form,
        packed: Slice<u8>,
        product: &Product,
        scratch: Slice<bf16>,
    ) -> Result<(), CudaError> {
        let product = Product {
            weights: scratch,
            fresh_weights: true,
            ..*product
        };
        // SAFETY: the caller vouches for what all of them ask for.
        unsafe {
            if product.tokens <= Packed::MAX_TOKENS {
                return self.packed.multiply(stream, form, packed, &product);
            }
            let shape = [product.outputs, product.inputs];
            self.packed.unpack(stream, form, packed, shape, scratch)?;
            self.launch(stream, &product)
        }
    }
}
