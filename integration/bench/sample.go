package main

import (
	"math"
	"slices"
	"time"
)

// sample is what was measured of one thing, in the order of the measurements.
type sample []float64

func (s *sample) add(d time.Duration, unit time.Duration) {
	*s = append(*s, float64(d)/float64(unit))
}

// quantile is the smallest measured value that at least the fraction q of the sample does not exceed (nearest
// rank): no figure is made up between two measurements. NaN where nothing was measured.
func (s sample) quantile(q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(s))
	rank := int(math.Ceil(q * float64(len(sorted))))
	return sorted[max(rank, 1)-1]
}

func (s sample) median() float64 { return s.quantile(0.5) }
func (s sample) p99() float64    { return s.quantile(0.99) }

// ratios are those of s to base, measurement by measurement.
func (s sample) ratios(base sample) sample {
	ratios := make(sample, len(s))
	for i := range s {
		ratios[i] = s[i] / base[i]
	}
	return ratios
}
