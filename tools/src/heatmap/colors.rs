//! Colours that everyone can tell apart: those of Okabe and Ito ("Color Universal Design", 2008)
//! for kinds, and viridis (van der Walt and Smith, 2015) for amounts, darker for more.

use super::picture::Rgb;
use crate::output;

/// All zeros.
pub(super) const ZERO: Rgb = Rgb(0xf3, 0xf3, 0xf0);
/// Not zero, and unchanged.
pub(super) const UNCHANGED: Rgb = Rgb(0xd4, 0xd6, 0xd8);
/// No memory.
pub(super) const HOLE: Rgb = Rgb(0xff, 0xff, 0xff);

const BLUE: Rgb = Rgb(0x00, 0x72, 0xb2);
const VERMILLION: Rgb = Rgb(0xd5, 0x5e, 0x00);

/// The colour of a cell in which `share` of the pages are shared with the parent, and none are new.
pub(super) fn shared(share: f64) -> Rgb {
    Rgb(0xb9, 0xd5, 0xea).towards(BLUE, shade(share))
}

/// The colour of a cell in which `share` of the pages are new.
pub(super) fn new(share: f64) -> Rgb {
    Rgb(0xf3, 0xb2, 0x7c).towards(VERMILLION, shade(share))
}

/// `share` in 16 shades: more cannot be told apart.
fn shade(share: f64) -> f64 {
    (share * 16.0).ceil() / 16.0
}

/// Viridis from its bright end to its dark one.
const VIRIDIS: [Rgb; 9] = [
    Rgb(0xfd, 0xe7, 0x25),
    Rgb(0xad, 0xdc, 0x30),
    Rgb(0x5e, 0xc9, 0x62),
    Rgb(0x28, 0xae, 0x80),
    Rgb(0x21, 0x91, 0x8c),
    Rgb(0x2c, 0x72, 0x8e),
    Rgb(0x3b, 0x52, 0x8b),
    Rgb(0x47, 0x2d, 0x7b),
    Rgb(0x44, 0x01, 0x54),
];

/// Where scales begin: the yellow before it is as light as `UNCHANGED`.
const PALEST: f64 = 0.2;

fn viridis(share: f64) -> Rgb {
    let at = share.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let below = (at as usize).min(VIRIDIS.len() - 2);
    VIRIDIS[below].towards(VIRIDIS[below + 1], at - below as f64)
}

/// A scale in steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Steps {
    /// The least value of each step, ascending; the first is 1.
    least: Vec<u64>,
    most: u64,
}

impl Steps {
    /// Steps from 1 to `most`, at most nine, each the same power of two times the one before.
    pub(super) fn to(most: u64) -> Self {
        let most = most.max(1);
        let bits = most.ilog2() + 1;
        let shift = bits.div_ceil(9).max(1);
        let least = (0..bits).step_by(shift as usize).map(|bit| 1_u64 << bit).collect();
        Self { least, most }
    }

    /// Steps that begin at the values `least`: ascending, the first is 1.
    pub(super) fn at(least: &[u64], most: u64) -> Self {
        Self { least: least.to_vec(), most }
    }

    /// The colour of `count`, which must not be 0.
    pub(super) fn color(&self, count: u64) -> Rgb {
        let step = self.least.partition_point(|least| *least <= count).max(1) - 1;
        self.color_of(step)
    }

    fn color_of(&self, step: usize) -> Rgb {
        match self.least.len() {
            // A middle colour, neither the palest nor the darkest.
            1 => viridis(0.5),
            steps => viridis(PALEST + (1.0 - PALEST) * step as f64 / (steps - 1) as f64),
        }
    }

    /// Each colour and the values it stands for.
    pub(super) fn legend(&self) -> Vec<(Rgb, String)> {
        let ends = self.least.iter().skip(1).map(|next| next - 1).chain([self.most]);
        let label = |(least, end): (&u64, u64)| match end {
            end if end <= *least => output::count(*least),
            end => format!("{}-{}", output::count(*least), output::count(end)),
        };
        let labels = self.least.iter().zip(ends).map(label);
        labels.enumerate().map(|(step, label)| (self.color_of(step), label)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(most: u64) -> Vec<String> {
        Steps::to(most).legend().into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn scales_have_a_step_for_everything_and_say_which() {
        assert_eq!(labels(1), ["1"]);
        assert_eq!(labels(5), ["1", "2-3", "4-5"]);
        assert_eq!(labels(256).last().unwrap(), "256");
        assert_eq!(labels(512), ["1-3", "4-15", "16-63", "64-255", "256-512"]);
        for most in [1, 2, 3, 100, 512, 4_352, 1 << 40, u64::MAX] {
            let steps = Steps::to(most);
            assert!(steps.least.len() <= 9, "{most}");
            let legend = steps.legend();
            assert_eq!(steps.color(1), legend[0].0, "{most}");
            assert_eq!(steps.color(most), legend.last().unwrap().0, "{most}");
        }
    }

    /// The lightness of a colour to the eye (CIE L*, roughly).
    fn lightness(Rgb(r, g, b): Rgb) -> f64 {
        let linear = |byte: u8| (f64::from(byte) / 255.0).powf(2.2);
        (0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)).cbrt() * 116.0 - 16.0
    }

    #[test]
    fn more_is_darker_even_without_colours() {
        for steps in [Steps::to(200), Steps::to(u64::MAX)] {
            let colors: Vec<Rgb> = steps.legend().into_iter().map(|(color, _)| color).collect();
            assert!(
                colors.windows(2).all(|pair| lightness(pair[0]) > lightness(pair[1]) + 4.0),
                "{colors:?}"
            );
        }
        // Even a cell of two pixels must be visible.
        let palest = [Steps::to(200).color(1), Steps::to(u64::MAX).color(1)].map(lightness);
        assert!(palest.iter().all(|palest| *palest < lightness(UNCHANGED) - 5.0), "{palest:?}");
        for ramp in [shared, new] {
            assert!(lightness(ramp(0.0)) < lightness(ZERO) - 10.0);
            assert!(lightness(ramp(0.0)) > lightness(ramp(0.5)) + 10.0);
            assert!(lightness(ramp(0.5)) > lightness(ramp(1.0)) + 10.0);
        }
    }
}
