//! How weights come to the device: as the file has them, where that has products there.

use std::borrow::Cow;
use std::ops::Range;

use hearth_kernels::cuda::{Gpu, MOST_USED, Matrix};
use hearth_kernels::matmul::Rows as _;
use hearth_kernels::quant::{self, DType};

use crate::config::ModelConfig;
use crate::weights::MatrixSource;
use crate::{Error, Result};

/// Takes matrices of one shape and type, one after the other in one piece of memory.
pub fn matrices(gpu: &Gpu, sources: &[MatrixSource<'_>]) -> Result<Vec<Matrix>> {
    let Some(first) = sources.first() else { return Ok(Vec::new()) };
    let (shape, count) = ([first.n, first.k], sources.len());
    let taken = |of: usize, rows: Range<usize>| sources[of].packed(rows);
    if let Some(dtype) = Matrix::stored_as(first.dtype) {
        return Ok(gpu.matrices(dtype, shape, count, |of, row| sources[of].row(row), taken)?);
    }
    // One of the formats that have no product of their own here, or floats of 32 bits.
    let row = |of: usize, row: usize| -> Cow<'_, [u8]> {
        let mut values = vec![0.0; first.k];
        quant::dequantize(first.dtype, &sources[of].row(row), &mut values);
        let bytes = quant::quantize(DType::BF16, &values);
        bytes.expect("floats have a quantiser; this is a bug").into()
    };
    Ok(gpu.matrices(DType::BF16, shape, count, row, taken)?)
}

/// Refuses a model whose experts have no kernels.
///
/// # Errors
/// More experts for a row than a warp has lanes, or widths that are not of eights.
pub fn check_experts(config: &ModelConfig) -> Result<()> {
    let Some(routing) = config.experts else { return Ok(()) };
    if routing.used > MOST_USED {
        let what = format!("{} experts for each row: a GPU has {MOST_USED} at most", routing.used);
        return Err(Error::Device(what));
    }
    let widths = [config.hidden_len, config.ffn_len];
    match widths.iter().all(|width| width.is_multiple_of(8)) {
        true => Ok(()),
        false => Err(Error::Device(format!("experts of {widths:?}: not eights, as a GPU wants"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Routing;

    #[test]
    fn experts_without_kernels_are_refused() {
        let refusal = |used: usize, ffn_len: usize| {
            let experts = Some(Routing { count: 64, used, normalized: true });
            check_experts(&ModelConfig { experts, ffn_len, ..crate::tiny::config() })
                .map_err(|error| error.to_string())
        };
        assert_eq!(refusal(32, 40), Ok(()));
        assert!(refusal(33, 40).unwrap_err().contains("33 experts for each row"));
        assert!(refusal(2, 44).unwrap_err().contains("44]: not eights"));
        assert!(check_experts(&crate::tiny::config()).is_ok(), "none");
    }
}
