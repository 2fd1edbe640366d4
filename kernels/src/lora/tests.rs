//! Every instruction set against the portable version, bit by bit, and against f64.

use super::*;
use crate::cases;

/// Shapes `[n, k, rank]`: one, tails of every kind, and real ones.
const SHAPES: [[usize; 3]; 8] = [
    [1, 1, 1],
    [3, 17, 2],
    [64, 16, 4],
    [65, 31, 5],
    [172, 64, 8],
    [100, 172, 13],
    [896, 1000, 16],
    [130, 255, 64],
];
const ROWS: usize = 13;
/// Rows 0, 6 and 12 have no adapter.
const GROUPS: [&[u32]; 3] = [&[1, 2, 3, 5, 7, 11, 10], &[4], &[9, 8]];

struct Case {
    factors: Vec<Factors>,
    ratio: Vec<f32>,
    gain: Vec<f32>,
    x: Vec<f32>,
    ids: Vec<u32>,
    y: Vec<f32>,
    table: bool,
}

impl Case {
    fn new([n, k, rank]: [usize; 3], float: Float, table: bool) -> Self {
        let factors = |seed: u64| {
            let shape = [n, k, rank + seed as usize % 2];
            let a = cases::randoms(shape[2] * k, seed);
            let b = cases::randoms(n * shape[2], seed + 1);
            match table {
                true => Factors::of_table(float, shape, &a, &b),
                false => Factors::new(float, shape, &a, &b),
            }
        };
        Self {
            factors: (0..3).map(|i| factors(10 + 3 * i)).collect(),
            ratio: cases::randoms(n, 5),
            gain: cases::randoms(n, 6),
            x: cases::randoms(ROWS * k, 7),
            ids: (0..ROWS).map(|row| (row * row + 1) as u32 % k as u32).collect(),
            y: cases::randoms(ROWS * n, 8),
            table,
        }
    }

    /// One part; two parts and a gain; one part with a ratio.
    fn groups<'a>(&'a self, rows: [&'a [u32]; 3]) -> Vec<Group<'a>> {
        let part = |i: usize| Part { factors: &self.factors[i], weight: 0.5, ratio: None };
        let scaled = Part { weight: -2.0, ratio: Some(&self.ratio), ..part(1) };
        let parts = [vec![part(0)], vec![part(1), part(2)], vec![scaled]];
        let gains = [None, Some(&self.gain[..]), None];
        let groups = rows.into_iter().zip(parts).zip(gains);
        groups.map(|((rows, parts), gain)| Group { rows, gain, parts }).collect()
    }

    fn run(&self, isa: Isa, threads: usize, rows: [&[u32]; 3]) -> Vec<f32> {
        let (mut y, groups) = (self.y.clone(), self.groups(rows));
        let input = match self.table {
            true => Input::Ids(&self.ids),
            false => Input::Rows(&self.x),
        };
        let mut twice = self.y.clone();
        let update = |y| Update { input, y, groups: &groups };
        add_with(isa, &Pool::new(threads), &mut [update(&mut y), update(&mut twice)]);
        cases::assert_same_bits(&y, &twice, "the second projection");
        y
    }

    /// In f64, and the largest update.
    fn truth(&self) -> (Vec<f64>, f64) {
        let n = self.factors[0].n();
        let mut y: Vec<f64> = self.y.iter().map(|y| f64::from(*y)).collect();
        let mut largest = 0.0f64;
        for group in self.groups(GROUPS) {
            for &row in group.rows {
                let y = &mut y[row as usize * n..][..n];
                if let Some(gain) = group.gain {
                    y.iter_mut().zip(gain).for_each(|(y, gain)| *y += f64::from(*gain) * *y);
                }
                for part in &group.parts {
                    let delta = self.delta(part, row as usize);
                    for (y, delta) in y.iter_mut().zip(delta) {
                        *y += delta;
                        largest = largest.max(delta.abs());
                    }
                }
            }
        }
        (y, largest)
    }

    fn delta(&self, part: &Part<'_>, row: usize) -> Vec<f64> {
        let f = part.factors;
        let (a, b, k, rank) = (f.to_a(), f.to_b(), f.k(), f.rank());
        let x = |i: usize| match self.table {
            true => f64::from(u8::from(self.ids[row] as usize == i)),
            false => f64::from(self.x[row * k + i]),
        };
        let h = (0..rank).map(|r| (0..k).map(|i| f64::from(a[r * k + i]) * x(i)).sum::<f64>());
        let h: Vec<f64> = h.map(|h| h * f64::from(part.weight)).collect();
        let ratio = |i: usize| part.ratio.map_or(1.0, |ratio| f64::from(ratio[i]));
        let row = |i: usize| (0..rank).map(|r| f64::from(b[i * rank + r]) * h[r]).sum::<f64>();
        (0..f.n()).map(|i| row(i) * ratio(i)).collect()
    }
}

fn all() -> impl Iterator<Item = (Case, String)> {
    let floats = [Float::F32, Float::F16, Float::BF16];
    SHAPES.into_iter().flat_map(move |shape| {
        floats.into_iter().flat_map(move |float| {
            let named = move |table| {
                (Case::new(shape, float, table), format!("{shape:?} {float:?} table {table}"))
            };
            [false, true].map(named)
        })
    })
}

#[test]
fn every_isa_is_near_the_truth_and_equal_to_scalar() {
    for (case, name) in all() {
        let scalar = case.run(Isa::Scalar, 1, GROUPS);
        let (truth, largest) = case.truth();
        for (got, want) in scalar.iter().zip(&truth) {
            let error = (f64::from(*got) - want).abs();
            assert!(error <= 2e-5 * (largest + 1.0), "{name}: {got} for {want}");
        }
        for isa in Isa::available() {
            for threads in [1, 3] {
                let got = case.run(*isa, threads, GROUPS);
                cases::assert_same_bits(&scalar, &got, &format!("{name} {}", isa.name()));
            }
        }
    }
}

#[test]
fn a_row_has_its_bits_in_any_company() {
    for (case, name) in all() {
        let (n, together) = (case.factors[0].n(), case.run(Isa::best(), 2, GROUPS));
        for row in 0..ROWS as u32 {
            let own = [row];
            let alone = GROUPS.map(|rows| if rows.contains(&row) { &own[..] } else { &[] });
            let alone = case.run(Isa::best(), 2, alone);
            let at = row as usize * n..(row as usize + 1) * n;
            cases::assert_same_bits(&alone[at.clone()], &together[at.clone()], &name);
            let changed = alone[at.clone()] != case.y[at];
            assert_eq!(changed, GROUPS.iter().any(|rows| rows.contains(&row)), "{name} row {row}");
        }
    }
}

#[test]
fn what_was_packed_comes_out_again() {
    let (a, b) = (cases::randoms(5 * 33, 1), cases::randoms(70 * 5, 2));
    for factors in [
        Factors::new(Float::F32, [70, 33, 5], &a, &b),
        Factors::of_table(Float::F32, [70, 33, 5], &a, &b),
    ] {
        assert_eq!((factors.to_a(), factors.to_b()), (a.clone(), b.clone()));
        assert_eq!(factors.bytes(), 4 * (5 * 33 + 128 * 5));
    }
}

#[test]
fn nothing_to_do_is_nothing() {
    let mut y = [1.0, 2.0];
    let (pool, input) = (Pool::new(2), Input::Rows(&[]));
    add(&pool, &mut []);
    add(&pool, &mut [Update { input, y: &mut y, groups: &[] }]);
    let nobody = [Group { rows: &[], gain: None, parts: Vec::new() }];
    add(&pool, &mut [Update { input, y: &mut y, groups: &nobody }]);
    assert_eq!(y, [1.0, 2.0]);
}
