//! A page with the curves of a run: one HTML file, drawings inside, nothing fetched.

use std::fmt::Write;

use super::report::{Point, Report};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
/// Around the field of a chart: left, right, top, bottom.
const MARGINS: [f64; 4] = [64.0, 150.0, 16.0, 44.0];
/// Told apart by people who see colours differently (Okabe and Ito, 2008).
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];

/// One curve of a chart.
struct Curve {
    name: &'static str,
    /// A point without the figure has no mark.
    of: fn(&Point) -> Option<f64>,
}

struct Chart {
    title: &'static str,
    unit: &'static str,
    curves: &'static [Curve],
}

const CHARTS: [Chart; 4] = [
    Chart {
        title: "Time to the first token",
        unit: "ms",
        curves: &[
            Curve { name: "p50", of: |p| Some(p.ttft_ms?.p50) },
            Curve { name: "p90", of: |p| Some(p.ttft_ms?.p90) },
            Curve { name: "p95", of: |p| Some(p.ttft_ms?.p95) },
            Curve { name: "p99", of: |p| Some(p.ttft_ms?.p99) },
        ],
    },
    Chart {
        title: "Time between tokens",
        unit: "ms",
        curves: &[
            Curve { name: "p50", of: |p| Some(p.itl_ms?.p50) },
            Curve { name: "p90", of: |p| Some(p.itl_ms?.p90) },
            Curve { name: "p95", of: |p| Some(p.itl_ms?.p95) },
            Curve { name: "p99", of: |p| Some(p.itl_ms?.p99) },
        ],
    },
    Chart {
        title: "Time to the end",
        unit: "ms",
        curves: &[
            Curve { name: "p50", of: |p| Some(p.e2e_ms?.p50) },
            Curve { name: "p90", of: |p| Some(p.e2e_ms?.p90) },
            Curve { name: "p95", of: |p| Some(p.e2e_ms?.p95) },
            Curve { name: "p99", of: |p| Some(p.e2e_ms?.p99) },
        ],
    },
    Chart {
        title: "Output",
        unit: "tokens/s",
        curves: &[Curve { name: "tokens/s", of: |p| Some(p.output_tokens_per_s) }],
    },
];

/// The whole page.
pub fn html(report: &Report) -> String {
    let mut points: Vec<&Point> = report.points.iter().collect();
    points.sort_by(|a, b| a.pressure().total_cmp(&b.pressure()));
    let across = match points.iter().any(|point| point.rate.is_some()) {
        true => "requests a second",
        false => "clients",
    };
    let charts: String = CHARTS.iter().map(|chart| draw(chart, &points, across)).collect();
    let title = format!("{} at {}", escaped(&report.model), escaped(&report.url));
    let limit = |name: &str, ms: Option<f64>| ms.map(|ms| format!(" · {name} ≤ {ms} ms"));
    let limits = [limit("first token", report.slo.ttft_ms), limit("token", report.slo.itl_ms)];
    let limits: String = limits.into_iter().flatten().collect();
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n\
         <style>{STYLE}</style>\n<h1>{title}</h1>\n\
         <p>{} · answers of at most {} tokens · hearth {}{limits}</p>\n{charts}{}</html>\n",
        report.endpoint,
        report.max_tokens,
        report.hearth,
        table(&points, across)
    )
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;\
    padding:0 1em;color:#222;background:#fff}h1{font-size:1.3em}h2{font-size:1em;margin:1.5em 0 0}\
    svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#444}\
    table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .7em;text-align:right;\
    border-bottom:1px solid #ddd}";

fn draw(chart: &Chart, points: &[&Point], across: &str) -> String {
    let [left, right, top, bottom] = MARGINS;
    let (width, height) = (WIDTH - left - right, HEIGHT - top - bottom);
    let values = chart.curves.iter().flat_map(|c| points.iter().filter_map(|p| (c.of)(p)));
    let steps = ticks(values.fold(0.0, f64::max));
    let highest = steps.last().copied().unwrap_or(1.0);
    let x_of = axis(points);
    let x = |point: &Point| left + width * x_of(point.pressure());
    let y = |value: f64| top + height * (1.0 - value / highest);
    let mut svg = format!(
        "<h2>{} ({})</h2>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n",
        chart.title, chart.unit
    );
    let mut put = |line: String| {
        svg.push_str(&line);
        svg.push('\n');
    };
    for step in &steps {
        let (at, end) = (y(*step), left + width);
        put(format!("<path d=\"M{left} {at:.1}H{end}\" stroke=\"#ddd\"/>"));
        let (at, text) = (at + 4.0, number(*step));
        put(format!("<text x=\"{}\" y=\"{at:.1}\" text-anchor=\"end\">{text}</text>", left - 8.0));
    }
    for point in points {
        let (at, below, text) = (x(point), top + height + 18.0, number(point.pressure()));
        put(format!("<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{text}</text>"));
    }
    let (middle, foot) = (left + width / 2.0, HEIGHT - 6.0);
    put(format!("<text x=\"{middle}\" y=\"{foot}\" text-anchor=\"middle\">{across}</text>"));
    for (index, (curve, colour)) in chart.curves.iter().zip(COLOURS).enumerate() {
        let marks: Vec<(f64, f64)> =
            points.iter().filter_map(|p| Some((x(p), y((curve.of)(p)?)))).collect();
        let path: Vec<String> = marks.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        if !path.is_empty() {
            let line = path.join("L");
            put(format!(
                "<path d=\"M{line}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
            ));
        }
        for (x, y) in &marks {
            put(format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>"));
        }
        let (x, y) = (left + width + 16.0, top + 14.0 + 20.0 * index as f64);
        put(format!(
            "<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"3\" fill=\"{colour}\"/>",
            y - 5.0
        ));
        put(format!("<text x=\"{}\" y=\"{y}\">{}</text>", x + 20.0, curve.name));
    }
    svg + "</svg>\n"
}

/// Where a pressure stands between the edges, 0 to 1: by its logarithm where they are far apart.
fn axis(points: &[&Point]) -> impl Fn(f64) -> f64 {
    let low = points.iter().map(|p| p.pressure()).fold(f64::INFINITY, f64::min);
    let high = points.iter().map(|p| p.pressure()).fold(0.0, f64::max);
    let is_wide = low > 0.0 && high / low >= 8.0;
    move |value| {
        // Half of a step stays free on both sides.
        let share = match (high > low, is_wide) {
            (false, _) => 0.5,
            (true, true) => (value / low).ln() / (high / low).ln(),
            (true, false) => (value - low) / (high - low),
        };
        0.05 + 0.9 * share
    }
}

/// Round numbers from 0 to at least `highest`, five or so.
fn ticks(highest: f64) -> Vec<f64> {
    let highest = if highest > 0.0 { highest } else { 1.0 };
    let power = 10f64.powf((highest / 5.0).log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * power);
    let step = steps.into_iter().find(|step| step * 5.0 >= highest * 0.999).unwrap_or(highest);
    (0..=(highest / step * 0.999).ceil() as usize).map(|n| n as f64 * step).collect()
}

/// As short as it can be read.
fn number(value: f64) -> String {
    let text = match value {
        0.0 => return "0".to_owned(),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn table(points: &[&Point], across: &str) -> String {
    let mut html = format!(
        "<h2>Figures</h2>\n<table><tr><th>{across}<th>answered<th>failed<th>tokens/s<th>good/s\
         <th>first p50<th>first p95<th>token p50<th>token p95<th>end p50<th>end p95\n"
    );
    for point in points {
        let spread = |p: Option<super::Percentiles>| match p {
            Some(p) => format!("<td>{:.1}<td>{:.1}", p.p50, p.p95),
            None => "<td>–<td>–".to_owned(),
        };
        let cells = [point.ttft_ms, point.itl_ms, point.e2e_ms].map(spread).concat();
        let failed = point.requests - point.answered;
        let (pressure, answered) = (number(point.pressure()), point.answered);
        let (tokens, good) = (point.output_tokens_per_s, point.goodput_per_s);
        // Writing to a string does not fail.
        let _ = writeln!(
            html,
            "<tr><td>{pressure}<td>{answered}<td>{failed}<td>{tokens:.1}<td>{good:.2}{cells}"
        );
    }
    html + "</table>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loadtest::{Pressure, Record, Server, Slo};
    use std::time::Duration;

    fn report(clients: &[usize]) -> Report {
        let mut server = Server::new("http://h", None, Duration::ZERO).unwrap();
        server.model = "<a & \"b\">".to_owned();
        let slo = Slo { ttft_ms: Some(300.0), itl_ms: None };
        let mut report = Report::new(&server, slo);
        for &clients in clients {
            let late = clients as f64 / 10.0;
            let record = Record {
                pieces_s: vec![late, late + 0.05],
                end_s: late + 0.05,
                output_tokens: 2,
                ..Record::default()
            };
            report.points.push(Point::of(Pressure::Clients(clients), &[record], 1.0, &slo));
        }
        report
    }

    #[test]
    fn the_page_stands_alone_and_has_every_point() {
        let page = html(&report(&[1, 8, 30]));
        assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="));
        assert!(page.contains("&lt;a &amp; &quot;b&quot;&gt;") && !page.contains("<a &"));
        // Three charts of four curves, one of one, three points each.
        assert_eq!(page.matches("<circle").count(), 39);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
        assert!(!html(&report(&[4])).contains("NaN") && !html(&report(&[])).contains("NaN"));
    }

    #[test]
    fn later_is_higher_and_more_is_further_right() {
        let page = html(&report(&[30, 1, 8]));
        let chart = page.split("</svg>").next().unwrap();
        let marks: Vec<(f64, f64)> = chart
            .lines()
            .filter(|line| line.contains("<circle") && line.contains(COLOURS[0]))
            .map(|line| {
                let number = |name: &str| {
                    let (_, rest) = line.split_once(&format!("{name}=\"")).unwrap();
                    rest.split('"').next().unwrap().parse().unwrap()
                };
                (number("cx"), number("cy"))
            })
            .collect();
        assert_eq!(marks.len(), 3);
        assert!(marks.windows(2).all(|m| m[0].0 < m[1].0 && m[0].1 > m[1].1), "{marks:?}");
    }

    const AXIS: &str = "0 0.2 0.4 0.6 0.8";

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!(ticks(100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.75).iter().map(|t| number(*t)).collect::<Vec<_>>().join(" "), AXIS);
        assert_eq!(ticks(1234.0).last(), Some(&1250.0));
        assert_eq!(ticks(0.0).last(), Some(&1.0));
        for n in 1..2000 {
            let highest = f64::from(n) * 0.37;
            let ticks = ticks(highest);
            assert!(*ticks.last().unwrap() >= highest * 0.99 && (2..9).contains(&ticks.len()));
        }
    }
}
