package monitoring

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"

	"github.com/prometheus/prometheus/promql"
)

const (
	column, row = 48, 30 // pixels of a step of Grafana's grid
	top         = 44
)

// draw draws the panels of a dashboard as Grafana arranges them, with what their queries have answered in half an hour.
func draw(all []panel, answers map[string]promql.Matrix) string {
	height := top
	var out strings.Builder
	for _, p := range all {
		x, y, w, h := p.GridPos.X*column+6, p.GridPos.Y*row+top, p.GridPos.W*column-8, p.GridPos.H*row-8
		height = max(height, y+h+10)
		fmt.Fprintf(&out, "  <rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" rx=\"3\" fill=\"#ffffff\" stroke=\"#d1d5db\"/>\n", x, y, w, h)
		title := p.Title
		if most := w/7 - 2; len(title) > most {
			title = title[:most-1] + "…"
		}
		fmt.Fprintf(&out, "  <text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text>\n", x+8, y+17, html.EscapeString(title))
		var named []series
		for _, target := range p.Targets {
			for _, answer := range answers[target.Expr] {
				named = append(named, series{legend(target.LegendFormat, answer), answer})
			}
		}
		slices.SortStableFunc(named, func(a, b series) int { return strings.Compare(a.name, b.name) })
		switch p.Type {
		case "timeseries":
			out.WriteString(lines(p, named, x, y, w, h))
		case "stat":
			for i, s := range named {
				at := x + 12 + i*(w-12)/len(named)
				fmt.Fprintf(&out, "  <text x=\"%d\" y=\"%d\" font-size=\"26\" fill=\"#15803d\">%s</text>\n", at, y+60, format(s.Floats[len(s.Floats)-1].F, p.FieldConfig.Defaults.Unit))
				fmt.Fprintf(&out, "  <text x=\"%d\" y=\"%d\">%s</text>\n", at, y+80, html.EscapeString(s.name))
			}
		default: // a table, as of the minute with most rows
			out.WriteString(rows(named, x, y))
		}
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %[1]d %[2]d" font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="11" fill="#1f2937">
  <title>The dashboard during a rollout</title>
  <desc>The panels of the chart's dashboard with the answers of Prometheus' engine to their queries: three nodes, of which one has no target for five minutes.</desc>
  <rect width="%[1]d" height="%[2]d" rx="6" fill="#f3f4f6"/>
  <text x="12" y="27" font-size="16" font-weight="bold">magic-ip-address</text>
%[3]s</svg>
`, 24*column+4, height, out.String())
}

type series struct {
	name string
	promql.Series
}

// legend fills a format of Grafana with the labels of a series.
func legend(format string, s promql.Series) string {
	var pairs []string
	for name, value := range s.Metric.Map() {
		format = strings.ReplaceAll(format, "{{"+name+"}}", value)
		pairs = append(pairs, name+"="+value)
	}
	slices.Sort(pairs)
	if format == "" {
		return strings.Join(pairs, "  ")
	}
	return format
}

// lines is a diagram with its axis and legend.
func lines(p panel, named []series, x, y, w, h int) string {
	colours := []string{"#2563eb", "#f59e0b", "#15803d", "#dc2626", "#7c3aed", "#0891b2"}
	most := 0.0
	for _, s := range named {
		for _, point := range s.Floats {
			if !math.IsNaN(point.F) {
				most = math.Max(most, point.F)
			}
		}
	}
	if most == 0 {
		most = 1
	}
	var out strings.Builder
	const names = 3 // that the legend has room for
	letters := 0
	for _, s := range named[:min(len(named), names)] {
		letters += 4 + len(s.name)
	}
	oneLine := 7*letters < w
	if !oneLine {
		h -= 16 * (min(len(named), names) - 1)
	}
	left, bottom, width, height := x+58, y+h-42, w-70, h-72
	for _, share := range []float64{0, 0.5, 1} {
		at := float64(bottom) - share*float64(height)
		fmt.Fprintf(&out, "  <path d=\"M%d %.1fh%d\" stroke=\"#e5e7eb\"/>\n", left, at, width)
		fmt.Fprintf(&out, "  <text x=\"%d\" y=\"%.1f\" text-anchor=\"end\" fill=\"#6b7280\">%s</text>\n", left-5, at+4, format(share*most, p.FieldConfig.Defaults.Unit))
	}
	every := 10
	if width < 200 {
		every = 30
	}
	for minute := 0; minute <= 30; minute += every {
		fmt.Fprintf(&out, "  <text x=\"%d\" y=\"%d\" text-anchor=\"middle\" fill=\"#6b7280\">%d min</text>\n", left+minute*(width-18)/30, bottom+14, minute)
	}
	legendX, legendY := x+10, y+h
	for i, s := range named {
		colour := colours[i%len(colours)]
		var path strings.Builder
		last := int64(0)
		for _, point := range s.Floats {
			if math.IsNaN(point.F) {
				continue
			}
			command := "L"
			if path.Len() == 0 || point.T-last > step.Milliseconds() {
				command = "M"
			}
			last = point.T
			fmt.Fprintf(&path, "%s%.1f %.1f", command, float64(left)+float64(point.T)/1000/1800*float64(width-18), float64(bottom)-point.F/most*float64(height))
		}
		fmt.Fprintf(&out, "  <path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"1.5\" stroke-linecap=\"round\"/>\n", path.String(), colour)
		if i < names {
			fmt.Fprintf(&out, "  <rect x=\"%d\" y=\"%d\" width=\"10\" height=\"3\" fill=\"%s\"/><text x=\"%d\" y=\"%d\">%s</text>\n", legendX, legendY-14, colour, legendX+14, legendY-9, html.EscapeString(s.name))
			if oneLine {
				legendX += 28 + 7*len(s.name)
			} else {
				legendY += 16
			}
		}
	}
	return out.String()
}

// rows are those of a table at the moment at which it has most.
func rows(named []series, x, y int) string {
	count := map[int64]int{}
	var at int64
	for _, s := range named {
		for _, point := range s.Floats {
			if count[point.T]++; count[point.T] >= count[at] {
				at = point.T
			}
		}
	}
	var out strings.Builder
	line := y + 38
	for _, s := range named {
		for _, point := range s.Floats {
			if point.T == at {
				fmt.Fprintf(&out, "  <text x=\"%d\" y=\"%d\">%s</text><text x=\"%d\" y=\"%d\" text-anchor=\"end\" font-weight=\"bold\">%s</text>\n",
					x+30, line, html.EscapeString(s.name), x+22, line, format(point.F, ""))
				line += 18
			}
		}
	}
	return out.String()
}

// format is a value in the unit of a panel.
func format(value float64, unit string) string {
	switch {
	case unit == "s" && value < 1:
		return fmt.Sprintf("%.3g ms", value*1000)
	case unit == "s":
		return fmt.Sprintf("%.3g s", value)
	case unit == "bytes" && value >= 1e5:
		return fmt.Sprintf("%.0f MB", value/1e6)
	case unit == "ops", unit == "reqps":
		return fmt.Sprintf("%.2g/s", value)
	}
	return fmt.Sprintf("%.3g", value)
}
