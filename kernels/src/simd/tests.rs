//! Every instruction set against the array of sixteen, bit by bit.

use super::*;
use crate::cases;
use bytemuck::Zeroable;

#[derive(Clone, Copy)]
enum Op {
    Exp,
    /// Of what is 0 or less, by polynomials of two degrees.
    Cubic,
    Quartic,
    Sigmoid,
    Halves,
    /// Of two bf16 each.
    Pairs,
    Select,
    Sum,
}

impl Map for Op {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, a: S::V, _: S::V) -> S::V {
        let zero = simd.splat(0.0);
        match self {
            Op::Exp => exp(simd, a),
            Op::Cubic | Op::Quartic => {
                let x = [simd.if_less(zero, a, simd.sub(zero, a), a)];
                let [y] = match self {
                    Op::Cubic => coarse_exps(simd, x, CUBIC),
                    _ => coarse_exps(simd, x, QUARTIC),
                };
                y
            }
            Op::Sigmoid => sigmoid(simd, a),
            Op::Select => {
                let b = simd.sub(zero, a);
                simd.if_less(a, zero, simd.max(a, b), simd.min(b, a))
            }
            Op::Sum => simd.splat(sum(simd, a)),
            Op::Halves => {
                let mut x = [0.0; LANES];
                simd.store(a, &mut x);
                let mut halves = [f16::ZERO; LANES];
                simd.store_f16(a, &mut halves);
                let wide = simd.load_f16(&halves);
                simd.add(wide, simd.load_bf16(&x.map(bf16::from_f32)))
            }
            Op::Pairs => {
                let mut x = [0.0; LANES];
                simd.store(a, &mut x);
                let x = x.map(|x| [bf16::from_f32(x), bf16::from_f32(3.0 - x)]);
                simd.sub(simd.load_firsts(&x), simd.load_seconds(&x))
            }
        }
    }
}

struct Unary<'a> {
    op: Op,
    x: &'a [f32],
}

impl Kernel for Unary<'_> {
    type Out = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut out = vec![0.0; self.x.len()];
        zip_map(simd, self.x, self.x, &mut out, self.op);
        out
    }
}

fn inputs() -> Vec<f32> {
    let edges = [0.0, -0.0, 1.0, -87.2, -87.4, 88.3, 200.0, -1e9, f32::INFINITY, f32::MIN_POSITIVE];
    let mut x: Vec<f32> = cases::randoms(4096, 1).iter().map(|x| x * 90.0).collect();
    x.extend(cases::randoms(1024, 2));
    x.extend(edges.iter().flat_map(|x| [*x, -*x]));
    x
}

#[test]
fn every_isa_gives_the_bits_of_scalar() {
    let x = inputs();
    use Op::*;
    for op in [Exp, Cubic, Quartic, Sigmoid, Halves, Pairs, Select, Sum] {
        let truth = run(Isa::Scalar, Unary { op, x: &x });
        for isa in Isa::available() {
            let got = run(*isa, Unary { op, x: &x });
            cases::assert_same_bits(&truth, &got, isa.name());
        }
    }
}

#[test]
fn functions_are_as_exact_as_documented() {
    let x = inputs();
    let e = run(Isa::Scalar, Unary { op: Op::Exp, x: &x });
    let [cubic, quartic] = [Op::Cubic, Op::Quartic].map(|op| run(Isa::Scalar, Unary { op, x: &x }));
    let s = run(Isa::Scalar, Unary { op: Op::Sigmoid, x: &x });
    for i in 0..x.len() {
        let wide = f64::from(x[i]);
        if (-87.3..=88.37).contains(&x[i]) {
            let relative = (f64::from(e[i]) / wide.exp() - 1.0).abs();
            assert!(relative < 2e-7, "exp({}) is off by {relative:e}", x[i]);
        }
        if x[i] < -87.3 {
            assert_eq!(e[i], 0.0);
        }
        if x[i].abs() <= 87.3 {
            for (got, limit) in [(cubic[i], 1e-4), (quartic[i], 8e-6)] {
                let relative = (f64::from(got) / (-wide.abs()).exp() - 1.0).abs();
                assert!(relative < limit, "exp({}) is off by {relative:e}", -x[i].abs());
            }
        } else {
            assert_eq!((cubic[i], quartic[i]), (0.0, 0.0));
        }
        assert!((f64::from(s[i]) - 1.0 / (1.0 + (-wide).exp())).abs() < 2e-7, "sigmoid({})", x[i]);
    }
}

#[test]
fn nan_stays_nan() {
    let x = [f32::NAN; LANES];
    for isa in Isa::available() {
        for op in [Op::Exp, Op::Cubic, Op::Quartic, Op::Sigmoid] {
            assert!(run(*isa, Unary { op, x: &x }).iter().all(|y| y.is_nan()), "{}", isa.name());
        }
    }
}

/// max, min and `if_less` of a and b, one after the other.
struct Chosen<'a>(&'a [f32; LANES], &'a [f32; LANES]);

impl Kernel for Chosen<'_> {
    type Out = [[u32; LANES]; 3];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [[u32; LANES]; 3] {
        let (a, b) = (simd.load(self.0), simd.load(self.1));
        let mut out = [[0.0; LANES]; 3];
        simd.store(simd.max(a, b), &mut out[0]);
        simd.store(simd.min(a, b), &mut out[1]);
        simd.store(simd.if_less(a, b, simd.splat(1.0), simd.splat(-1.0)), &mut out[2]);
        out.map(|lanes| lanes.map(f32::to_bits))
    }
}

#[test]
fn what_has_no_order_gives_the_second() {
    let specials = [f32::NAN, 1.0, -0.0, 0.0];
    let a: [f32; LANES] = std::array::from_fn(|i| specials[i / 4]);
    let b: [f32; LANES] = std::array::from_fn(|i| specials[i % 4]);
    let pick = |first: fn(&f32, &f32) -> bool| {
        std::array::from_fn(|i| if first(&a[i], &b[i]) { a[i] } else { b[i] }.to_bits())
    };
    let less = std::array::from_fn(|i| if a[i] < b[i] { 1.0_f32 } else { -1.0 }.to_bits());
    for isa in Isa::available() {
        let truth = [pick(|a, b| a > b), pick(|a, b| a < b), less];
        assert_eq!(run(*isa, Chosen(&a, &b)), truth, "{}", isa.name());
    }
}

/// Numbers that meet all of some bytes: signed with the unsigned, unsigned with the signed.
struct Dots<'a> {
    unsigned: &'a [[[u8; 4]; LANES]],
    signed: &'a [[[i8; 4]; LANES]],
    with: [&'a [[f32; LANES]]; 2],
}

impl Kernel for Dots<'_> {
    type Out = [[f32; LANES]; 2];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [[f32; LANES]; 2] {
        let mut sums = [simd.splat_ints(-7); 2];
        let mut quads = [[S::Quad::zeroed(); LANES / 4]; 2];
        for (i, (a, b)) in self.unsigned.iter().zip(self.signed).enumerate() {
            for (quads, with) in quads.iter_mut().zip(self.with) {
                simd.store_quads(simd.load(&with[i / 4]), quads);
            }
            sums[0] = simd.dot_unsigned(simd.load_unsigned(a), &quads[0][i % 4], sums[0]);
            sums[1] = simd.dot_signed(simd.load_signed(b), &quads[1][i % 4], sums[1]);
        }
        let mut out = [[0.0; LANES]; 2];
        simd.store(simd.to_floats(sums[0]), &mut out[0]);
        simd.store(simd.to_floats(sums[1]), &mut out[1]);
        out
    }
}

#[test]
fn sums_of_quads_are_exact() {
    let bytes = |seed, range: std::ops::RangeInclusive<i64>| {
        let (low, high) = range.into_inner();
        let numbers = cases::randoms(40 * 4 * LANES, seed).into_iter();
        let mut x: Vec<i64> =
            numbers.map(|x| ((x + 1.0) / 2.0 * (high - low) as f32) as i64 + low).collect();
        // All that could overflow at once, of either sign where there are two.
        x[..8 * LANES].fill(high);
        x[8 * LANES..12 * LANES].fill(low);
        x[12 * LANES..16 * LANES].fill(high);
        x
    };
    let (unsigned, signed) = (bytes(3, 0..=255), bytes(4, -128..=127));
    let mut with = [bytes(5, -127..=127), bytes(6, 0..=255)];
    with[0][12..16].fill(-127);
    with[1][12..16].fill(255);
    let truth = [(&unsigned, &with[0]), (&signed, &with[1])].map(|(a, b)| {
        let quads = a.as_chunks::<4>().0.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<4>().0);
        let dot = |a: &[i64; 4], b: &[i64; 4]| a.iter().zip(b).map(|(a, b)| a * b).sum::<i64>();
        let lane = |i: usize| quads.clone().map(|(a, b)| dot(&a[i], b)).sum::<i64>() - 7;
        std::array::from_fn::<f32, LANES, _>(|i| lane(i) as f32)
    });
    let unsigned: Vec<u8> = unsigned.iter().map(|x| *x as u8).collect();
    let signed: Vec<i8> = signed.iter().map(|x| *x as i8).collect();
    let with = with.map(|all| all.iter().map(|x| *x as f32).collect::<Vec<f32>>());
    for isa in Isa::available() {
        let got = run(
            *isa,
            Dots {
                unsigned: unsigned.as_chunks::<4>().0.as_chunks::<LANES>().0,
                signed: signed.as_chunks::<4>().0.as_chunks::<LANES>().0,
                with: [with[0].as_chunks::<LANES>().0, with[1].as_chunks::<LANES>().0],
            },
        );
        cases::assert_same_bits(truth.as_flattened(), got.as_flattened(), isa.name());
    }
}

/// Sums of products of pairs with rounded numbers.
struct PairDots<'a>(&'a [[[i16; 2]; LANES]], &'a [[f32; LANES]]);

impl Kernel for PairDots<'_> {
    type Out = [f32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [f32; LANES] {
        let mut sums = simd.splat_ints(-7);
        for (a, with) in self.0.chunks(LANES / 2).zip(self.1) {
            let mut pairs = [[0; 2]; LANES / 2];
            simd.store_pairs(simd.load(with), &mut pairs);
            for (a, b) in a.iter().zip(&pairs) {
                sums = simd.dot_pairs(simd.load_pairs(a), b, sums);
            }
        }
        let mut out = [0.0; LANES];
        simd.store(simd.to_floats(sums), &mut out);
        out
    }
}

#[test]
fn sums_of_pairs_are_exact() {
    // Halves are rounded to even; heads as long as there are, and numbers as large.
    let mut with = cases::randoms(4 * LANES, 7).iter().map(|x| x * 2000.0).collect::<Vec<f32>>();
    with[..7].copy_from_slice(&[32_700.0, -32_700.0, 0.5, 1.5, -0.5, -2.5, 32_699.5]);
    let rows = cases::randoms(4 * 2 * 8 * LANES, 8);
    let mut rows: Vec<i16> = rows.iter().map(|x| (x * 2000.0) as i16).collect();
    rows[..4].copy_from_slice(&[32_700, -32_700, -32_700, -32_700]);
    let truth: [f32; LANES] = std::array::from_fn(|lane| {
        let terms = with.iter().enumerate().map(|(i, x)| {
            x.round_ties_even() as i64 * i64::from(rows[(i / 2 * LANES + lane) * 2 + i % 2])
        });
        (terms.sum::<i64>() - 7) as f32
    });
    let rows = rows.as_chunks::<2>().0.as_chunks::<LANES>().0;
    for isa in Isa::available() {
        let got = run(*isa, PairDots(rows, with.as_chunks::<LANES>().0));
        cases::assert_same_bits(&truth, &got, isa.name());
    }
}

/// Sixteen rounded numbers, as a product with one shows them; whether they have no sign.
struct Quads<'a>(&'a [f32; LANES], bool);

impl Kernel for Quads<'_> {
    type Out = [f32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [f32; LANES] {
        let mut quads = [S::Quad::zeroed(); LANES / 4];
        simd.store_quads(simd.load(self.0), &mut quads);
        let mut numbers = [0.0; LANES];
        for (quad, numbers) in quads.iter().zip(numbers.as_chunks_mut::<4>().0) {
            for (i, number) in numbers.iter_mut().enumerate() {
                let mut one = [[0; 4]; LANES];
                one[0][i] = 1;
                let zero = simd.splat_ints(0);
                let sums = match self.1 {
                    true => simd.dot_signed(
                        simd.load_signed(&one.map(|q| q.map(|x| x as i8))),
                        quad,
                        zero,
                    ),
                    false => simd.dot_unsigned(simd.load_unsigned(&one), quad, zero),
                };
                let mut lanes = [0.0; LANES];
                simd.store(simd.to_floats(sums), &mut lanes);
                *number = lanes[0];
            }
        }
        numbers
    }
}

#[test]
fn quads_are_the_nearest_bytes_ties_to_even() {
    let x = [
        0.0, -0.0, 0.5, 1.5, -0.5, -1.5, 2.5, 127.0, -127.0, 0.49999997, 126.6, -3.2, 126.5,
        -126.5, 1e-30, -7.0,
    ];
    // Those of weights have no sign, and are looked at by what has one.
    let weights = x.map(|x: f32| x.abs() * 2.0 + 0.46875);
    for isa in Isa::available() {
        let truth = x.map(|x: f32| x.round_ties_even() + 0.0);
        assert_eq!(run(*isa, Quads(&x, false)), truth, "{}", isa.name());
        let truth = weights.map(f32::round_ties_even);
        assert_eq!(run(*isa, Quads(&weights, true)), truth, "{}", isa.name());
    }
}

struct Rounded<'a>(&'a [f32; LANES]);

impl Kernel for Rounded<'_> {
    type Out = [i16; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [i16; LANES] {
        round(simd, simd.load(self.0))
    }
}

#[test]
fn rounding_is_to_the_nearest_ties_to_even() {
    let x = [
        0.0, -0.0, 0.5, 1.5, -0.5, -1.5, 2.5, 32767.0, -32768.0, 0.49999997, 126.6, -3.2, 32766.5,
        -32767.5, 1e-30, -7.0,
    ];
    for isa in Isa::available() {
        let truth = x.map(|x: f32| x.round_ties_even() as i16);
        assert_eq!(run(*isa, Rounded(&x)), truth, "{}", isa.name());
    }
}
