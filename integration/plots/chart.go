package main

import (
	"bytes"
	"image/color"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// colours are those of Okabe and Ito, which people tell apart however they see colours. Each peer has its own in all charts.
var colours = map[string]color.RGBA{ //nolint:gochecknoglobals // a table
	magicNFTables: {0x00, 0x72, 0xb2, 255},
	magicIPTables: {0x56, 0xb4, 0xe9, 255},
	serviceLocal:  {0xd5, 0x5e, 0x00, 255},
	serviceSame:   {0xe6, 0x9f, 0x00, 255},
	hostPort:      {0x00, 0x9e, 0x73, 255},
	unixSocket:    {0xcc, 0x79, 0xa7, 255},
	poller:        {0x40, 0x40, 0x40, 255},
	ciliumLRP:     {0xf0, 0xe4, 0x42, 255},
	ciliumService: {0xd5, 0x5e, 0x00, 255},
	podAlone:      {0xff, 0xff, 0xff, 255},
	ownAddress:    {0xff, 0xff, 0xff, 255},
}

// bar is a median with whiskers to the least and the most.
type bar struct{ median, low, high float64 }

// series are the bars of a peer, one in each group; NaN where there is none, infinite for what never came.
type series struct {
	peer string
	bars []bar
}

// empty reports whether a peer has no bar at all.
func (s series) empty() bool {
	return !slices.ContainsFunc(s.bars, func(b bar) bool { return !math.IsNaN(b.median) })
}

// chart is a drawing: bars in groups, or curves.
type chart struct {
	file, title, axis string
	groups            []string
	series            []series
	curves            map[string][]float64 // of a CDF: the values by peer
	order             []string             // of the curves
	logarithmic       bool
	floor             float64 // of a logarithmic axis
}

const (
	width       = 27 * vg.Centimeter
	height      = 11 * vg.Centimeter
	legendWidth = 7.5 * vg.Centimeter // of the width; fonts of readers may be wider than the one that it is laid out for
)

func (c chart) draw() ([]byte, error) {
	plot.DefaultFont = font.Font{Typeface: "Liberation", Variant: "Sans"}
	p := plot.New()
	p.Title.Text, p.Title.TextStyle.Font.Size, p.Title.Padding = c.title, 13, vg.Points(8)
	p.Legend.Top, p.Legend.Left, p.Legend.TextStyle.Font.Size = true, true, 10
	p.Legend.Padding, p.Legend.ThumbnailWidth = vg.Points(3), vg.Points(24)
	if c.curves != nil {
		c.drawCurves(p)
	} else {
		c.drawBars(p)
	}
	canvas := vgsvg.New(width, height)
	area := draw.New(canvas)
	area.FillPolygon(color.White, []vg.Point{area.Min, {X: area.Max.X, Y: area.Min.Y}, area.Max, {X: area.Min.X, Y: area.Max.Y}}) // on dark pages too
	// The legend stands beside the data.
	legend := p.Legend
	p.Legend = plot.NewLegend()
	data := width - legendWidth
	p.Draw(draw.Crop(area, vg.Points(4), -legendWidth, vg.Points(4), -vg.Points(4)))
	legend.Draw(draw.Crop(area, data+vg.Points(8), 0, 0, -vg.Points(34)))
	var out bytes.Buffer
	if _, err := canvas.WriteTo(&out); err != nil {
		return nil, err
	}
	// Browsers have other fonts of that kind.
	return []byte(strings.ReplaceAll(out.String(), "Liberation Sans", "Liberation Sans,Arial,Helvetica,sans-serif")), nil
}

func (c chart) drawBars(p *plot.Plot) {
	p.NominalX(c.groups...)
	p.X.Tick.Label.Font.Size = 10
	p.Y.Label.Text, p.Y.Label.TextStyle.Font.Size = c.axis, 11
	top := 0.0
	for _, s := range c.series {
		for _, b := range s.bars {
			for _, v := range []float64{b.median, b.high} {
				if !math.IsInf(v, 0) && !math.IsNaN(v) {
					top = math.Max(top, v)
				}
			}
		}
	}
	p.Y.Min, p.Y.Max, p.Y.Tick.Marker = 0, math.Max(top*1.08, 1), plot.TickerFunc(ticks)
	if c.logarithmic {
		p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
		p.Y.Min, p.Y.Max = c.floor, math.Pow(10, math.Ceil(math.Log10(math.Max(top*1.2, c.floor*10))))
	}
	grid := plotter.NewGrid()
	grid.Vertical.Color = nil
	grid.Horizontal.Color = color.Gray{0xdd}
	p.Add(grid)
	shown := slices.DeleteFunc(slices.Clone(c.series), series.empty)
	for i, s := range shown {
		drawn := &bars{series: s, index: i, of: len(shown)}
		p.Add(drawn)
		p.Legend.Add(s.peer, drawn)
	}
	p.X.Min, p.X.Max = -0.5, float64(len(c.groups))-0.5
}

// ticks are the library's, without the zeroes that it writes behind the point where it counts by 2.5.
func ticks(low, high float64) []plot.Tick {
	all := plot.DefaultTicks{}.Ticks(low, high)
	for i := range all {
		if strings.Contains(all[i].Label, ".") {
			all[i].Label = strings.TrimRight(strings.TrimRight(all[i].Label, "0"), ".")
		}
	}
	return all
}

// bars draws a series; what never came has a bar without fill to the top, and says so.
type bars struct {
	series
	index, of int
}

// share is the part of a group's width that bars take.
const share = 0.84

func (b *bars) Plot(c draw.Canvas, p *plot.Plot) {
	toX, toY := p.Transforms(&c)
	outline := draw.LineStyle{Color: color.Black, Width: vg.Points(0.6)}
	for group, v := range b.bars {
		if math.IsNaN(v.median) {
			continue
		}
		wide := share / float64(b.of)
		left := float64(group) - share/2 + wide*float64(b.index)
		x0, x1 := toX(left+wide*0.05), toX(left+wide*0.95)
		middle := (x0 + x1) / 2
		clamp := func(y float64) vg.Length { return toY(math.Min(math.Max(y, p.Y.Min), p.Y.Max)) }
		bottom, top := clamp(p.Y.Min), clamp(v.median)
		rectangle := []vg.Point{{X: x0, Y: bottom}, {X: x1, Y: bottom}, {X: x1, Y: top}, {X: x0, Y: top}, {X: x0, Y: bottom}}
		if math.IsInf(v.median, 1) {
			dashed := outline
			dashed.Dashes = []vg.Length{vg.Points(3), vg.Points(2)}
			c.StrokeLines(dashed, rectangle)
			style := p.X.Tick.Label
			style.Font.Size, style.Rotation, style.XAlign, style.YAlign = 9, math.Pi/2, draw.XRight, draw.YCenter
			c.FillText(style, vg.Point{X: middle, Y: top - vg.Points(4)}, "never")
			continue
		}
		c.FillPolygon(colours[b.peer], rectangle)
		c.StrokeLines(outline, rectangle)
		if math.IsNaN(v.low) || math.IsNaN(v.high) {
			continue
		}
		low, high, half := clamp(v.low), clamp(v.high), (x1-x0)/5
		c.StrokeLines(outline, []vg.Point{{X: middle, Y: low}, {X: middle, Y: high}})
		for _, y := range []vg.Length{low, high} {
			c.StrokeLines(outline, []vg.Point{{X: middle - half, Y: y}, {X: middle + half, Y: y}})
		}
	}
}

// Thumbnail is the mark in the legend.
func (b *bars) Thumbnail(c *draw.Canvas) {
	points := []vg.Point{{X: c.Min.X, Y: c.Min.Y}, {X: c.Max.X, Y: c.Min.Y}, {X: c.Max.X, Y: c.Max.Y}, {X: c.Min.X, Y: c.Max.Y}, {X: c.Min.X, Y: c.Min.Y}}
	c.FillPolygon(colours[b.peer], points)
	c.StrokeLines(draw.LineStyle{Color: color.Black, Width: vg.Points(0.6)}, points)
}

// drawCurves draws which part of the runs was not more than that; a curve that ends below all of them is of runs in which it never came.
func (c chart) drawCurves(p *plot.Plot) {
	p.X.Label.Text, p.X.Label.TextStyle.Font.Size = c.axis, 11
	p.Y.Label.Text, p.Y.Label.TextStyle.Font.Size = "part of the runs", 11
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = color.Gray{0xdd}, color.Gray{0xdd}
	p.Add(grid)
	top := c.floor * 10
	for _, values := range c.curves {
		for _, v := range values {
			if !math.IsInf(v, 0) {
				top = math.Max(top, v)
			}
		}
	}
	top = math.Pow(10, math.Ceil(math.Log10(top)))
	for i, peer := range c.order {
		values := c.curves[peer]
		points := plotter.XYs{{X: c.floor, Y: 0}}
		part := 0.0
		for _, v := range values { // in their order
			if math.IsInf(v, 0) {
				break
			}
			x := math.Max(v, c.floor)
			points = append(points, plotter.XY{X: x, Y: part})
			part += 1 / float64(len(values))
			points = append(points, plotter.XY{X: x, Y: part})
		}
		points = append(points, plotter.XY{X: top, Y: part})
		curve := &plotter.Line{XYs: points, LineStyle: draw.LineStyle{Color: colours[peer], Width: vg.Points(2.2), Dashes: dashes(i)}}
		p.Add(curve)
		p.Legend.Add(peer, curve)
	}
	p.X.Min, p.X.Max, p.Y.Min, p.Y.Max = c.floor, top, 0, 1.02
}

// dashes tell curves apart without colours.
func dashes(i int) []vg.Length {
	return [][]vg.Length{nil, {vg.Points(8), vg.Points(3)}, {vg.Points(2), vg.Points(2)}, {vg.Points(8), vg.Points(2), vg.Points(2), vg.Points(2)}}[i%4]
}
