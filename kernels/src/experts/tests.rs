//! Routes against a sort, sums against the truth in f64.

use super::*;
use crate::cases::{assert_same_bits, randoms};

/// Experts, experts used.
const ROUTINGS: [[usize; 2]; 6] = [[1, 1], [2, 1], [4, 4], [8, 2], [60, 4], [128, 8]];

/// The same by sorting, with the weights of each row by expert.
fn truth(scores: &[f32], routing: &Routing) -> Vec<Vec<(usize, f64)>> {
    let row = |scores: &[f32]| {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        order.truncate(routing.used);
        let exp = |&expert: &usize| f64::from(scores[expert]).exp();
        let total: f64 = match routing.normalized {
            true => order.iter().map(exp).sum(),
            false => (0..scores.len()).map(|expert| exp(&expert)).sum(),
        };
        order.sort_unstable();
        order.iter().map(|expert| (*expert, exp(expert) / total)).collect()
    };
    scores.chunks_exact(routing.count).map(row).collect()
}

#[test]
fn routes_are_those_of_a_sort() {
    for [count, used] in ROUTINGS {
        for (normalized, m) in [(true, 1), (false, 7), (true, 130), (false, 0)] {
            let routing = Routing { count, used, normalized };
            let scores: Vec<f32> =
                randoms(m * count, (count + m) as u64).iter().map(|x| 4.0 * x).collect();
            let routes = route(&scores, &routing);
            let want = truth(&scores, &routing);
            assert_eq!(routes.rows.len(), m * used);
            let mut end = 0;
            for (expert, places) in &routes.groups {
                assert_eq!((places.start, places.is_empty()), (end, false));
                end = places.end;
                let rows = &routes.rows[places.clone()];
                assert!(rows.is_sorted_by(|a, b| a < b), "rows of an expert are in order");
                for &row in rows {
                    assert!(want[row as usize].iter().any(|(e, _)| e == expert));
                }
            }
            assert_eq!(end, m * used);
            for (row, want) in want.iter().enumerate() {
                let parts = &routes.parts[row * used..][..used];
                for (&(place, weight), &(expert, wanted)) in parts.iter().zip(want) {
                    let of = routes.groups.iter().find(|(_, r)| r.contains(&(place as usize)));
                    assert_eq!((of.unwrap().0, routes.rows[place as usize]), (expert, row as u32));
                    assert!((f64::from(weight) - wanted).abs() < 1e-7, "{weight} for {wanted}");
                }
            }
        }
    }
}

#[test]
fn the_first_of_equals_is_chosen_and_no_number_comes_last() {
    let routing = Routing { count: 5, used: 2, normalized: true };
    let chosen = |scores: [f32; 5]| -> Vec<usize> {
        route(&scores, &routing).groups.iter().map(|(expert, _)| *expert).collect()
    };
    assert_eq!(chosen([1.0, 2.0, 2.0, 2.0, 0.0]), [1, 2]);
    assert_eq!(chosen([f32::NAN, -1.0, f32::NAN, -5.0, f32::NEG_INFINITY]), [1, 3]);
    assert_eq!(chosen([f32::NAN; 5]), [0, 1]);
    let poisoned = route(&[f32::NAN; 5], &routing);
    assert!(poisoned.parts.iter().all(|(_, weight)| weight.is_nan()), "a wrong row stays wrong");
}

#[test]
fn sums_are_near_the_truth_and_rows_do_not_know_each_other() {
    let width = 37;
    for [count, used] in ROUTINGS {
        let routing = Routing { count, used, normalized: used > 1 };
        let m = 23;
        let (scores, x) = (randoms(m * count, 5), randoms(m * width, 6));
        let routes = route(&scores, &routing);
        let (one, three) = (Pool::new(1), Pool::new(3));
        let mut picked = vec![f32::NAN; m * used * width];
        gather(&three, &x, width, &routes, &mut picked);
        // An expert multiplies by its number.
        for (expert, places) in &routes.groups {
            for y in &mut picked[places.start * width..places.end * width] {
                *y *= *expert as f32 + 1.0;
            }
        }
        let mut out = vec![f32::NAN; m * width];
        combine(&three, &picked, width, &routes, &mut out);
        let want = truth(&scores, &routing);
        for (row, want) in want.iter().enumerate() {
            let factor: f64 = want.iter().map(|(e, weight)| (*e as f64 + 1.0) * weight).sum();
            for (got, x) in out[row * width..][..width].iter().zip(&x[row * width..]) {
                let want = factor * f64::from(*x);
                assert!((f64::from(*got) - want).abs() < 1e-6 * (1.0 + want.abs()));
            }
            let alone = route(&scores[row * count..][..count], &routing);
            let mut own = vec![0.0; used * width];
            gather(&one, &x[row * width..][..width], width, &alone, &mut own);
            for (expert, places) in &alone.groups {
                let factor = *expert as f32 + 1.0;
                own[places.start * width..places.end * width].iter_mut().for_each(|y| *y *= factor);
            }
            let mut sum = vec![0.0; width];
            combine(&one, &own, width, &alone, &mut sum);
            assert_same_bits(&sum, &out[row * width..][..width], "a row alone");
        }
    }
}

#[test]
fn every_row_gets_the_bias_of_its_expert() {
    let n = 37;
    for [count, used] in ROUTINGS {
        let routing = Routing { count, used, normalized: true };
        for m in [0, 1, 5, 700] {
            let routes = route(&randoms(m * count, 7), &routing);
            let biases = randoms(count * n, 9);
            let y = randoms(m * used * n, 8);
            let mut got = y.clone();
            add_biases(&Pool::new(3), &mut got, n, &routes, &biases);
            let mut want = y;
            for (expert, places) in &routes.groups {
                for row in want[places.start * n..places.end * n].chunks_exact_mut(n) {
                    row.iter_mut()
                        .zip(&biases[*expert * n..][..n])
                        .for_each(|(y, bias)| *y += bias);
                }
            }
            assert_same_bits(&want, &got, "biases");
        }
    }
}
