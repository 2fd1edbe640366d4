//! Hidden states of a text to one vector, and vectors to unit length.

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// The state of the first token.
    Cls,
    /// The largest of each number over all tokens.
    Max,
}

impl Pooling {
    /// `states [tokens, width]`, at least one token, to `[width]`.
    pub(super) fn pool(self, states: &[f32], width: usize) -> Vec<f32> {
        let mut rows = states.chunks_exact(width);
        let mut out = rows.next().map(<[f32]>::to_vec).unwrap_or_default();
        match self {
            Self::Cls => {}
            Self::Max => rows.for_each(|row| {
                out.iter_mut().zip(row).for_each(|(out, x)| *out = out.max(*x));
            }),
            Self::Mean => {
                rows.for_each(|row| out.iter_mut().zip(row).for_each(|(out, x)| *out += x));
                let count = (states.len() / width) as f32;
                out.iter_mut().for_each(|x| *x /= count);
            }
        }
        out
    }
}

/// The first `len` numbers of a vector, brought back to length 1 where `normalize` says so.
pub fn cut(vector: &mut Vec<f32>, len: usize, normalize: bool) {
    if len < vector.len() {
        vector.truncate(len);
        if normalize {
            self::normalize(vector);
        }
    }
}

/// To length 1; a vector of zeros stays.
pub(super) fn normalize(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    if squares > 0.0 {
        let scale = (1.0 / squares.sqrt()) as f32;
        vector.iter_mut().for_each(|x| *x *= scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [f32; 6] = [1.0, -2.0, 3.0, 4.0, -7.0, -2.0];

    #[test]
    fn each_way_of_pooling() {
        assert_eq!(Pooling::Mean.pool(&STATES, 2), [-1.0, 0.0]);
        assert_eq!(Pooling::Cls.pool(&STATES, 2), [1.0, -2.0]);
        assert_eq!(Pooling::Max.pool(&STATES, 2), [3.0, 4.0]);
        for pooling in [Pooling::Mean, Pooling::Cls, Pooling::Max] {
            assert_eq!(pooling.pool(&STATES[..2], 2), [1.0, -2.0], "one token is itself");
        }
    }

    #[test]
    fn a_cut_vector_has_length_one_again_where_the_whole_one_had() {
        let whole = vec![3.0, 4.0, 12.0];
        let mut vector = whole.clone();
        cut(&mut vector, 2, true);
        assert_eq!(vector, [0.6, 0.8]);
        let mut vector = whole.clone();
        cut(&mut vector, 2, false);
        assert_eq!(vector, [3.0, 4.0]);
        let mut vector = whole.clone();
        cut(&mut vector, 3, true);
        assert_eq!(vector, whole, "nothing to cut, nothing to change");
        let mut zeros = [0.0; 3];
        normalize(&mut zeros);
        assert_eq!(zeros, [0.0; 3]);
    }
}
