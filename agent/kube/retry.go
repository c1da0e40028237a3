package kube

import "net/http"

// isPoll marks the context of a poll.
type isPoll struct{}

// patience does not let client-go wait where the API server asks a poll to come later (429, 503): the next poll does,
// and what the API server has said is told.
type patience struct{ http.RoundTripper }

func (p patience) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := p.RoundTripper.RoundTrip(request)
	if err == nil && request.Context().Value(isPoll{}) != nil {
		response.Header.Del("Retry-After")
	}
	return response, err
}

// WrappedRoundTripper is how client-go finds what is beneath.
func (p patience) WrappedRoundTripper() http.RoundTripper { return p.RoundTripper }
