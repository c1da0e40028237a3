package kube

import (
	"context"
	"errors"
	"fmt"
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
// client-go waits for Retry-After in the request that was answered so, and in no other one; what was answered is not known
// before that is over. So it does not see the header: the request fails at once, and the next one waits here.
type throttle struct {
	next http.RoundTripper

	mu     sync.Mutex
	until  time.Time
	answer int // the status that asked for it
}

// urgency is the key of a context that says what a request does while the API server is to be left alone; by default it waits.
type urgency struct{}

const (
	// sheds: it fails. A poll does, for the next one comes soon, and what the API server answered is shown meanwhile.
	sheds = "sheds"
	// once: it is sent all the same. The last request of a process is.
	once = "once"
)

// errThrottled is the error of a request that is not sent for as long as the API server asks to be left alone.
var errThrottled = errors.New("the API server asks to be left alone for a while")

func withUrgency(ctx context.Context, how string) context.Context {
	return context.WithValue(ctx, urgency{}, how)
}

func (t *throttle) RoundTrip(request *http.Request) (*http.Response, error) {
	how := request.Context().Value(urgency{})
	if wait, answer := t.wait(); wait > 0 && how != once {
		throttled := fmt.Errorf("%w: it answered %d %s", errThrottled, answer, http.StatusText(answer))
		if how == sheds {
			return nil, throttled
		}
		select {
		case <-request.Context().Done():
			return nil, fmt.Errorf("%w: %w", throttled, request.Context().Err())
		case <-time.After(wait):
		}
	}
	response, err := t.next.RoundTrip(request)
	if err != nil || response.StatusCode != http.StatusTooManyRequests && response.StatusCode < http.StatusInternalServerError {
		return response, err
	}
	if after := min(retryAfter(response.Header.Get("Retry-After")), maxRetryAfter); after > 0 {
		t.mu.Lock()
		t.until, t.answer = time.Now().Add(after+rand.N(max(after/2, time.Second))), response.StatusCode
		t.mu.Unlock()
	}
	response.Header.Del("Retry-After")
	return response, nil
}

// WrappedRoundTripper is how client-go finds what is beneath.
func (t *throttle) WrappedRoundTripper() http.RoundTripper { return t.next }

// wait is how long the API server is to be left alone, and with which status it asked for that.
func (t *throttle) wait() (wait time.Duration, answer int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Until(t.until), t.answer
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
