package kube

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// maxRetryAfter bounds how long the API server is left alone: no answer of a proxy blinds the agent for a day.
const maxRetryAfter = 5 * time.Minute

// throttle sends no request for as long as the API server asks for (Retry-After of 429 and 5xx, RFC 9110, section 10.2.3), and
// for up to half as long again, so that the nodes of a cluster do not return at one moment.
//
// client-go waits for Retry-After in the request that was answered so, and in no other one.
type throttle struct {
	next http.RoundTripper

	mu    sync.Mutex
	until time.Time
}

// urgency is the key of a context that says what a request does while the API server is to be left alone; by default it waits.
type urgency struct{}

const (
	// sheds: it fails. A poll does, for the next one comes soon, and what the API server answered is shown meanwhile.
	sheds = "sheds"
	// once: it is sent all the same. The last request of a process is.
	once = "once"
)

// errThrottled is the error of a request that sheds.
var errThrottled = errors.New("the API server asks to be left alone for a while")

func withUrgency(ctx context.Context, how string) context.Context {
	return context.WithValue(ctx, urgency{}, how)
}

func (t *throttle) RoundTrip(request *http.Request) (*http.Response, error) {
	how := request.Context().Value(urgency{})
	if wait := t.wait(); wait > 0 && how != once {
		if how == sheds {
			return nil, errThrottled
		}
		select {
		case <-request.Context().Done():
			return nil, request.Context().Err()
		case <-time.After(wait):
		}
	}
	response, err := t.next.RoundTrip(request)
	if err != nil || response.StatusCode != http.StatusTooManyRequests && response.StatusCode < http.StatusInternalServerError {
		return response, err
	}
	if after := min(retryAfter(response.Header.Get("Retry-After")), maxRetryAfter); after > 0 {
		t.mu.Lock()
		t.until = time.Now().Add(after + rand.N(max(after/2, time.Second)))
		t.mu.Unlock()
		response.Header.Set("Retry-After", strconv.Itoa(int(after.Seconds())))
	}
	if how != nil {
		response.Header.Del("Retry-After") // client-go does not wait with it
	}
	return response, nil
}

// WrappedRoundTripper is how client-go finds what is beneath.
func (t *throttle) WrappedRoundTripper() http.RoundTripper { return t.next }

// wait is how long the API server is to be left alone.
func (t *throttle) wait() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Until(t.until)
}

// retryAfter parses the header, in seconds or a date; 0 without one.
func retryAfter(header string) time.Duration {
	if seconds, err := strconv.Atoi(header); err == nil && seconds > 0 {
		return time.Duration(min(seconds, int(maxRetryAfter.Seconds()))) * time.Second
	}
	if date, err := http.ParseTime(header); err == nil {
		return time.Until(date)
	}
	return 0
}
