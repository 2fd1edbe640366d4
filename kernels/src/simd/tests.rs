//! Every instruction set against the array of sixteen, bit by bit.

use super::*;
use crate::cases;

#[derive(Clone, Copy)]
enum Op {
    Exp,
    Sigmoid,
    Halves,
    Select,
    Sum,
}

impl Map for Op {
    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, a: S::V, _: S::V) -> S::V {
        let zero = simd.splat(0.0);
        match self {
            Op::Exp => exp(simd, a),
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
    for op in [Op::Exp, Op::Sigmoid, Op::Halves, Op::Select, Op::Sum] {
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
        assert!((f64::from(s[i]) - 1.0 / (1.0 + (-wide).exp())).abs() < 2e-7, "sigmoid({})", x[i]);
    }
}

#[test]
fn nan_stays_nan() {
    let x = [f32::NAN; LANES];
    for isa in Isa::available() {
        for op in [Op::Exp, Op::Sigmoid] {
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

struct Dots<'a> {
    pairs: &'a [[[i8; 2]; LANES]],
    with: &'a [[i16; 2]],
}

impl Kernel for Dots<'_> {
    type Out = [f32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [f32; LANES] {
        let mut sums = simd.zero_ints();
        for (pairs, with) in self.pairs.iter().zip(self.with) {
            sums = simd.dot_pairs(simd.load_pairs(pairs), *with, sums);
        }
        let mut out = [0.0; LANES];
        simd.store(simd.to_floats(sums), &mut out);
        out
    }
}

#[test]
fn sums_of_pairs_are_exact() {
    let numbers = cases::randoms(40 * 2 * LANES, 3);
    let mut bytes: Vec<i8> = numbers.iter().map(|x| (x * 128.0) as i8).collect();
    bytes[..4 * LANES].fill(i8::MIN);
    let mut with: Vec<i16> = cases::randoms(80, 4).iter().map(|x| (x * 32768.0) as i16).collect();
    with[..4].copy_from_slice(&[i16::MIN, i16::MIN, i16::MAX, i16::MIN]);
    let (pairs, with) = (bytes.as_chunks::<2>().0.as_chunks::<LANES>().0, with.as_chunks::<2>().0);
    let product = |a: i8, b: i16| i64::from(a) * i64::from(b);
    let truth: [f32; LANES] = std::array::from_fn(|i| {
        let terms = pairs.iter().zip(with);
        let sum: i64 = terms.map(|(a, b)| product(a[i][0], b[0]) + product(a[i][1], b[1])).sum();
        sum as f32
    });
    for isa in Isa::available() {
        let got = run(*isa, Dots { pairs, with });
        cases::assert_same_bits(&truth, &got, isa.name());
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
