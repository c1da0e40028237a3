package quote

// Colour is a parameter of ECMA-48's SGR, which a terminal shows text by.
type Colour string

// The colours that tables use.
const (
	Faint  Colour = "2"
	Red    Colour = "31"
	Green  Colour = "32"
	Yellow Colour = "33"
)

// Paint is the text in this colour, or the text alone unless wanted. The text is quoted already.
func (c Colour) Paint(wanted bool, text string) string {
	if !wanted || c == "" || text == "" {
		return text
	}
	return "\x1b[" + string(c) + "m" + text + "\x1b[0m"
}
