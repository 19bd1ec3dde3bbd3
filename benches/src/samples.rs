//! Measured values and their percentiles.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// Values of one measurement: nanoseconds, or counts.
#[derive(Clone, Debug)]
pub(crate) struct Samples {
    histogram: Histogram<u64>,
}

impl Samples {
    pub(crate) fn new() -> Self {
        let histogram = Histogram::new(3).expect("three digits are within what histograms keep");
        Self { histogram }
    }

    /// Adds a count.
    pub(crate) fn add(&mut self, value: u64) {
        self.histogram.record(value).expect("a histogram made by `new` grows to hold any value");
    }

    /// Adds a time.
    pub(crate) fn add_time(&mut self, time: Duration) {
        self.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Calls `work` and adds the time it took.
    pub(crate) fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let out = work();
        self.add_time(started.elapsed());
        out
    }

    /// The number of values.
    pub(crate) fn n(&self) -> u64 {
        self.histogram.len()
    }

    /// The value that the share `quantile` of all values does not exceed.
    pub(crate) fn at(&self, quantile: f64) -> f64 {
        self.histogram.value_at_quantile(quantile) as f64
    }

    /// The median.
    pub(crate) fn median(&self) -> f64 {
        self.at(0.5)
    }

    /// Like [`Self::at`], for times: in microseconds.
    pub(crate) fn us(&self, quantile: f64) -> f64 {
        self.at(quantile) / 1e3
    }

    /// Like [`Self::at`], for times: in milliseconds.
    pub(crate) fn ms(&self, quantile: f64) -> f64 {
        self.at(quantile) / 1e6
    }

    /// `amount` per second, if `amount` takes the median time.
    pub(crate) fn per_second(&self, amount: f64) -> f64 {
        amount / (self.median() / 1e9).max(1e-9)
    }
}
